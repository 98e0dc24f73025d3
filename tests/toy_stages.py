"""A small distillation in stages through run.py, and the transfer set that it leaves."""
import toy

SIZES = ("--embedding-size", 6, "--hidden-size", 5)
SMALL = (*SIZES, "--epochs", 2, "--batch-size", 8, "--augment", 40, "--pretrain", 2, "--transfer", 2, "--match-size", 4,
         "--stage-tokens", 64, "--no-plots")


def distil(work, out, *more):
    return toy.main("distil", "12345", "--teacher", work / "LoRA", "--text", work / "plain.txt", "--out", out, *SMALL, *more)


def cache(folder):
    (found,) = folder.glob("transfer-*")
    return found


def new_sentences(folder) -> list[list[str]]:
    """Returns kind and text of each sentence of the transfer set; other tests make smaller ones in the same cache."""
    tables = [path.read_text().splitlines() for path in cache(folder).glob("sentences-*.tsv")]
    return [line.split("\t")[:2] for line in next(lines for lines in tables if len(lines) == 40)]


def first_table(staged):
    """The transfer set of `staged`, the oldest in the cache: other tests add sets from other sources."""
    return min(cache(staged).glob("sentences-*.tsv"), key=lambda path: path.stat().st_mtime_ns)

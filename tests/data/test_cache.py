"""A folder of the cache is made once, and whoever waits for it says so."""
import threading
import warnings

from data.cache import made_once


def test_a_second_process_that_needs_a_folder_says_that_it_waits(tmp_path):
    """A thread stands for the first process: the lock is held by an open file, not by a process."""
    begun, may_end, made = threading.Event(), threading.Event(), []

    def make(folder):
        begun.set()
        may_end.wait(10)
        folder.mkdir()
        made.append(folder)

    first = threading.Thread(target=made_once, args=(tmp_path / "model", make))
    first.start()
    begun.wait(10)
    threading.Timer(0.2, may_end.set).start()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert made_once(tmp_path / "model", make) == tmp_path / "model"
    first.join()
    assert [str(warning.message) for warning in said] == [
        "model: another process makes it now, for its first use; waiting for it"]
    assert len(made) == 1 and (tmp_path / "model").is_dir()


def test_a_folder_that_is_whole_is_not_waited_for(tmp_path):
    (tmp_path / "model").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made_once(tmp_path / "model", None) == tmp_path / "model"

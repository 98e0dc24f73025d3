"""Writes the losses of a distillation as LaTeX, stage by stage, with the weights that its options give them.

    soft_formula(run)    # the teacher's part of the loss
    objectives(run)      # the table: stage, model, texts, loss
"""

from report.latex import escape, tabular
from report.records import BASELINE, model_name
from report.runs import Run
from report.tables import STAGES

# --kd-loss -> formula of the teacher's part, as distillation/losses.py computes it; averages are over the batch.
SOFT = {
    "kl": r"\tau^2\,\KL\bigl(p^{\tau}_T \,\Vert\, p^{\tau}_S\bigr)",
    "mse": r"\frac{1}{K}\sum_{k=1}^{K} (z_{S,k} - z_{T,k})^2",
    "hard": r"\mathrm{CE}\bigl(z_S, \textstyle\arg\max_k z_{T,k}\bigr)",
    "reverse-kl": r"\tau^2\,\KL\bigl(p^{\tau}_S \,\Vert\, p^{\tau}_T\bigr)",
    "js": (r"\tau^2\bigl(w\,\KL(p^{\tau}_T \Vert m) + (1-w)\,\KL(p^{\tau}_S \Vert m)\bigr),\quad "
           r"m = w\,p^{\tau}_T + (1-w)\,p^{\tau}_S,\quad w = {}"),
    "dkd": (r"\tau^2\bigl(\KL(b_T \Vert b_S) + w\,\KL(\hat p_T \Vert \hat p_S)\bigr),\quad "
            r"b = (p^{\tau}_y, 1 - p^{\tau}_y),\quad \hat p = p^{\tau}_{k \ne y} / (1 - p^{\tau}_y),\quad w = {}"),
    "dist": (r"\tau^2\bigl(1 - \overline{\rho}_{\text{rows}} + 1 - \overline{\rho}_{\text{classes}}\bigr),\quad "
             r"\rho\ \text{Pearson's correlation of } p^{\tau}_T \text{ and } p^{\tau}_S"),
    "rkd": (r"\ell\bigl(d_S, d_T\bigr) + 2\,\ell\bigl(a_S, a_T\bigr),\quad \ell\ \text{Huber's},\ d\ \text{distances},\ "
            r"a\ \text{cosines of angles among pooled states}"),
}
# Weight inside a loss -> its option.
WEIGHTS = {"js": "js_weight", "dkd": "dkd_weight"}
OTHER_PROBLEMS = {
    "regression": r"(z_S - z_T)^2",
    "multi-label": r"\tau^2\,\tfrac{1}{K}\sum_{k} \KL\bigl(\sigma(z_{T,k}/\tau) \,\Vert\, \sigma(z_{S,k}/\tau)\bigr)"}


def soft_formula(run: Run) -> str:
    """Returns the formula of the teacher's part of the loss."""
    if run.problem in OTHER_PROBLEMS and run.options.get("kd_loss", "kl") != "mse":
        return OTHER_PROBLEMS[run.problem]
    name = run.options.get("kd_loss", "kl")
    # Two classes in a row always correlate by 1 or -1: that part is left out.
    if name == "dist" and len(run.classes) == 2:
        return (r"\tau^2\bigl(1 - \overline{\rho}_{\text{classes}}\bigr),\quad "
                r"\rho\ \text{Pearson's correlation over the batch}")
    weight = f"{run.options[WEIGHTS[name]]:g}" if name in WEIGHTS else ""
    # A loss of somebody's own has no formula here.
    return SOFT.get(name, rf"\text{{{escape(name)}}}") + weight


def _weighted(*terms: tuple[float, str]) -> str:
    """Returns a sum as mathematics, without the terms of weight 0 and without factors of 1."""
    parts = [("" if weight == 1 else rf"{weight:g}\,") + rf"\mathcal{{L}}_{{\text{{{name}}}}}"
             for weight, name in terms if weight]
    return f"${' + '.join(parts) or '0'}$"


def objectives(run: Run) -> str:
    """Makes the table of the losses: stage, student or baseline, the texts, and the terms with their weights."""
    options, rows = run.options, []
    names = [stage["stage"] for stage in run.summary.section("student").get("stages", [])] or ["gold"]
    alpha, repeats = run.summary.section("distillation").number("alpha"), options.get("gold_repeats", 0)
    hidden = 1.0 if options.get("match", "none") == "hidden" else 0.0
    edits = options.get("edit_weight") or 0.0
    gold = _weighted((alpha, "soft"), (1 - alpha, "gold"))
    with_baseline = BASELINE in run.summary
    for name in names:
        if name == "pretrain":
            language = options.get("lm_weight") or (0.0 if hidden else 1.0)
            lines = [("student", "transfer set, training set, plain texts", _weighted((language, "LM"), (hidden, "hid"))),
                     (BASELINE, "training set and plain texts, as many steps", _weighted((language, "LM")))]
        elif name == "transfer":
            extra = ((hidden, "hid"), (edits, "edit"))
            # Relations of states teach no class: the transfer set keeps KL.
            lines = [("student", "new texts, without a gold label", _weighted((1.0, "soft"), *extra)),
                     ("", f"training set, {repeats} times an epoch",
                      _weighted((alpha, "soft"), (1 - alpha, "gold"), *extra)),
                     (BASELINE, "training set, as many steps", _weighted((1.0, "gold"), (edits, "edit")))]
        else:
            lines = [("student", "training set", gold),
                     (BASELINE, "training set, the same batches", _weighted((1.0, "gold")))]
        shown = [line for line in lines if line[0] != BASELINE or with_baseline]
        rows += [["" if number else STAGES.get(name, escape(name)), model_name(model), sentences, loss]
                 for number, (model, sentences, loss) in enumerate(shown)]
    return tabular("llll", "stage & model & texts & loss", rows)

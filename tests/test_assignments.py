"""The assignments: their tests accept the solutions, reject the stubs and typical mistakes; the
syllabus names what exists."""
import configparser
import importlib
import inspect
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import test_scripts
import torch
import torch.nn.functional as F

from configurator import ROOT
from labs import course
from labs.assignments import adapters as stubs
from labs.solutions import adapters as solutions
from model import MiniCPMConfig

ASSIGNMENTS = {
    "mup_table": ["mup_table"],
    "parabola": ["best_rate", "over_seeds"],
    "lr_at": ["lr_at"],
    "fit_law": ["fit", "best_split"],
    "dpo_loss": ["answer_logp", "dpo_loss"],
    "routing": ["top2", "balance_loss"],
    "ntk_base": ["frequencies", "ntk_base", "dynamic_base"],
}


def failures(name, answers):
    """Return {test: message} of the tests of an assignment that these answers do not pass."""
    module, found = importlib.import_module(f"labs.assignments.tests.test_{name}"), {}
    for test, function in vars(module).items():
        if test.startswith("test_"):
            try:
                function(answers)
            except (AssertionError, ValueError) as error:
                found[test] = str(error)
    return found


def with_mistake(**functions):
    """The solutions, with some functions replaced."""
    return SimpleNamespace(**{name: getattr(solutions, name) for name in solutions.__all__}
                           | dict(fit=fit_once) | functions)


def fit_once(n, d, loss, known={}):
    """The solution, which takes a tenth of a second per fit, once for the same losses."""
    key = loss.tobytes()
    if key not in known:
        known[key] = solutions.fit(n, d, loss)
    return known[key]


def run_pytest(capsys, *options):
    """Run the students' command in this process. Returns (exit code, what it printed)."""
    capsys.readouterr()
    for name in ASSIGNMENTS:                # which file it is depends on the folder of the adapters
        sys.modules.pop(name, None)
    code = pytest.main([str(ROOT / "labs" / "assignments"), f"--rootdir={ROOT}", "-n0", "-p",
                        "no:cacheprovider", *options])
    return code, capsys.readouterr().out


# ---- solutions and stubs

@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_the_solution_passes(name):
    assert failures(name, solutions) == {}


def test_bare_stubs_fail_every_test_and_say_what_is_to_be_written(capsys):
    code, said = run_pytest(capsys)
    assert code == 1 and re.findall(r"^(\w+) +0 of 5$", said, re.M) == sorted(ASSIGNMENTS)
    assert "total         0 of 35" in said
    for i, (name, functions) in enumerate(ASSIGNMENTS.items(), 1):
        for function in functions:
            assert f"E   NotImplementedError: assignment {i}: write {function}" in said, function


def test_code_may_lie_anywhere_and_a_wrong_answer_costs_its_own_points(tmp_path, capsys):
    """An adapter file in a student's folder, which imports from there."""
    (tmp_path / "my_muP_code.py").write_text("def table(width, layers, *rest):\n    "
                                             "return {'embedding': (0.1, 0.01, 11)}\n")
    text = (ROOT / "labs" / "assignments" / "adapters.py").read_text(
        encoding="utf-8").replace("    from ", "    from labs.solutions.")
    text = text.replace("from labs.solutions.mup_table import mup_table",
                        "from my_muP_code import table as mup_table")
    (tmp_path / "adapters.py").write_text(text)
    code, said = run_pytest(capsys, f"--adapters={tmp_path / 'adapters.py'}", "--tb=no", "-rN")
    assert re.search(r"^mup_table +0 of 5$", said,
                     re.M) and len(re.findall(" 5 of 5$", said, re.M)) == 6, said
    assert code == 1 and "total        30 of 35" in said and "FAILED" not in said
    code, said = run_pytest(capsys, "--adapters=nowhere.py")
    assert code == pytest.ExitCode.USAGE_ERROR


def test_solved_stubs_beside_an_unchanged_adapters_file_get_all_points(tmp_path, capsys):
    """What a student hands in who has written into the stubs; the teacher's own are empty."""
    shutil.copy(ROOT / "labs" / "assignments" / "adapters.py", tmp_path)
    for name in ASSIGNMENTS:
        shutil.copy(ROOT / "labs" / "solutions" / f"{name}.py", tmp_path)
    code, said = run_pytest(capsys, f"--adapters={tmp_path / 'adapters.py'}", "--tb=no", "-rN")
    assert code == 0 and "total        35 of 35" in said, said


def test_the_default_suite_does_not_collect_the_students_tests():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "pytest.ini")
    assert settings["pytest"]["testpaths"] == "tests"
    tests = ROOT / "labs" / "assignments" / "tests"
    assert len(list(tests.glob("test_*.py"))) == len(ASSIGNMENTS)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_stub_is_a_problem_with_all_its_parts(name):
    stub, solution = (importlib.import_module(f"labs.{folder}.{name}")
                      for folder in ("assignments", "solutions"))
    number = list(ASSIGNMENTS).index(name) + 1
    assert re.match(rf"Assignment {number}: .*\((?:paper )?section|Assignment {number}: .* \(paper",
                    stub.__doc__)
    assert solution.__doc__.startswith(f"Solution {number}: ")
    parts = [stub.__doc__.index(f"\n{part}")
             for part in ("Question", "Formula", "Shapes,", "units", "Given", "Passes",
                          "Think       1. ", "            2. ", "            3. ")]
    assert parts == sorted(parts)
    assert all(f"{i}. " in solution.__doc__.split("\nThink ")[1] for i in (1, 2, 3))
    for function in ASSIGNMENTS[name]:
        signature = inspect.signature(getattr(stub, function))
        assert signature == inspect.signature(
            getattr(solution, function)) == inspect.signature(getattr(stubs, function))
        assert getattr(stub, function).__doc__


def test_what_the_solutions_say_about_the_think_questions():
    """Numbers of the answers that can be computed."""
    assert solutions.lr_at(279_500, 1, 0, 0, 261_000, 5000) == pytest.approx(0.077, abs=5e-4)
    for law, ratio in (((0, 406.4, .34, 410.7, .28), 93), ((0, 482.01, .3478, 2085.43, .3658), 18)):
        n, d = solutions.best_split(law, 5.76e23)
        assert round(d / n) == ratio
    undecided, sure = [.2502, .2501, .2499, .2498], [1e-6, 1e-6, .5, .5 - 2e-6]
    logits = torch.tensor([undecided] * 3 + [sure]).log()
    assert float(
        solutions.balance_loss(logits, solutions.top2(logits)[1])) == pytest.approx(0.875, abs=1e-3)
    assert round((1_000_000 / 10_000) ** (62 / 64)) == 87
    assert 1 - 2 ** (-1 / 6.24) == pytest.approx(0.105, abs=5e-4)
    assert np.log(4) / 0.1 == pytest.approx(13.9, abs=0.05)
    config = MiniCPMConfig(num_experts=8)
    assert config.n_params_active / MiniCPMConfig().n_params_non_embedding == pytest.approx(
        1.65, abs=5e-3)


# ---- typical mistakes

def mup(std=0.5, lr=1, residual=1, head=1, embedding=0, ignore_base=False):
    """The table with other powers of m; residual: branches per layer."""
    def table(width, layers, base=256, init_std=0.1, lr0=0.01, scale_emb=12.0, scale_depth=1.4):
        m = width / (256 if ignore_base else base)
        return {"embedding": (init_std / m ** embedding, lr0, scale_emb),
                "matrix": (init_std / m ** std, lr0 / m ** lr,
                           scale_depth / (residual * layers) ** 0.5),
                "head": (init_std / m ** embedding, lr0, 1 / m ** head), "norm": (0.0, lr0, 1.0)}
    return dict(mup_table=table)


def rate(warmed=1, half=0.5, start=0, keep_floor=True, printed=False):
    def lr_at(step, peak, floor, warmup, decay_start, half_life):
        if step < warmup:
            return peak * (step + warmed) / warmup
        if step < decay_start:
            return peak
        k = step - (2 * decay_start if printed else decay_start) + start
        return max(floor if keep_floor else 0, peak * half ** (k / half_life))
    return dict(lr_at=lr_at)


def fit_without_constant(n, d, loss):
    """E = 0: two power laws alone, log L = log A - alpha log N - beta log D would be the same
    mistake."""
    best = (np.inf,)
    for alpha in np.linspace(0.02, 0.6, 15):
        for beta in np.linspace(0.02, 0.6, 15):
            terms = np.stack([n ** -alpha, d ** -beta], 1)
            (a, b), *_ = np.linalg.lstsq(terms / terms.mean(0), loss, rcond=None)
            error = ((terms / terms.mean(0) @ [a, b] - loss) ** 2).sum()
            best = min(best, (error, alpha, beta, a / terms[:, 0].mean(), b / terms[:, 1].mean()))
    _, alpha, beta, a, b = best
    return 0.0, a, alpha, b, beta


def fit_one_exponent(n, d, loss):
    """alpha = beta."""
    best = (np.inf,)
    for alpha in np.linspace(0.05, 1, 39):
        terms = np.stack([np.ones_like(n), n ** -alpha, d ** -alpha], 1)
        size = terms.mean(0)
        constants = np.linalg.lstsq(terms / size, loss, rcond=None)[0]
        best = min(best,
                   (((terms / size @ constants - loss) ** 2).sum(), alpha, *(constants / size)))
    _, alpha, e, a, b = best
    return e, a, alpha, b, alpha


def split(six=6, swap=False, share=lambda a, b: b / (a + b), inverse=1):
    def best_split(law, flops):
        _, a, alpha, b, beta = law
        n = (alpha * a / (beta * b)) ** (
            inverse / (alpha + beta)) * (flops / six) ** share(alpha, beta)
        return (flops / six / n, n) if swap else (n, flops / six / n)
    return dict(best_split=best_split)


def vertex(axis=np.log, back=np.exp, refuse=True, points=None, downwards=False):
    def best_rate(rates, losses):
        rates, losses = np.array(rates), np.array(losses)
        if points:
            near = np.argsort(losses)[:points]
            rates, losses = rates[near], losses[near]
        a, b, c = np.polyfit(axis(rates), losses, 2)
        with np.errstate(over="ignore"):
            best = back(-b / (2 * a))
        if refuse and (a <= 1e-9 and not downwards or not rates.min() <= best <= rates.max()):
            raise ValueError("outside")
        return float(best), float(c - b * b / 4 / a)
    return dict(best_rate=best_rate, over_seeds=solutions.over_seeds)


def spread(mean=lambda v: np.exp(np.log(v).mean()),
           deviation=lambda v: np.exp(np.log(v).std(ddof=1))):
    def over_seeds(rates, losses):
        vertices = np.array([solutions.best_rate(rates, row)[0] for row in losses])
        return float(mean(vertices)), float(deviation(vertices))
    return dict(over_seeds=over_seeds)


def seeds_averaged(rates, losses):
    return solutions.best_rate(rates, np.mean(losses, 0))[0], solutions.over_seeds(rates, losses)[1]


def refused_by_the_lowest_point(rates, losses):
    lowest_point(rates, losses)
    return solutions.best_rate(rates, losses)


def lowest_point(rates, losses):
    loss, rate = min(zip(losses, rates))
    if rate in (min(rates), max(rates)):
        raise ValueError("lowest rate: expected inside of the rates")
    return float(rate), float(loss)


def preference(margin, activation=F.logsigmoid, mean=False):
    def dpo_loss(policy, reference, beta):
        loss = -activation(margin(policy, reference, beta))
        return loss.mean() if mean else loss
    return dict(dpo_loss=dpo_loss)


def right_margin(policy, reference, beta):
    ratio = policy - reference
    return beta * (ratio[:, 0] - ratio[:, 1])


def logp(shift=1, reduce=torch.sum, masked=True):
    def answer_logp(logits, tokens, is_answer):
        log_p = logits[:, :-1].log_softmax(-1) if shift else logits[:, 1:].log_softmax(-1)
        chosen = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
        return torch.stack([reduce(row[mask] if masked else row)
                            for row, mask in zip(chosen, is_answer[:, 1:])])
    return dict(answer_logp=answer_logp)


def naive_logp(logits, tokens, is_answer):
    log_p = logits[:, :-1].softmax(-1).log().gather(-1, tokens[:, 1:, None])[..., 0]
    return torch.stack([row[mask].sum() for row, mask in zip(log_p, is_answer[:, 1:])])


def route(renormalize=True, ascending=False, detach=False):
    def top2(logits):
        logits = logits.detach() if detach else logits
        weights, experts = logits.softmax(-1).topk(2)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights.flip(-1), experts.flip(-1)) if ascending else (weights, experts)
    return dict(top2=top2)


def balance(choices=2, per=2, factor=True, p=lambda logits: logits.softmax(-1), detach=False):
    def balance_loss(logits, experts):
        E, T = logits.shape[-1], len(logits)
        f = torch.bincount(experts[:, :choices].flatten(), minlength=E) / (per * T)
        loss = (E if factor else 1) * (f * p(logits).mean(0)).sum()
        return loss.detach() if detach else loss
    return dict(balance_loss=balance_loss)


def shrinking_base(theta, head_dim, factor, length, max_position):
    scale = factor * length / max_position - (factor - 1)
    return theta if scale <= 0 else solutions.ntk_base(theta, head_dim, scale)


def chosen_only(logits):
    p = logits.softmax(-1)
    return torch.zeros_like(p).scatter(-1, p.topk(2).indices, p.topk(2).values)


def base(exponent=lambda dim: dim / (dim - 2)):
    def ntk_base(theta, head_dim, factor):
        return theta * factor ** exponent(head_dim)

    def dynamic_base(theta, head_dim, factor, length, max_position):
        return theta if length <= max_position else ntk_base(
            theta, head_dim, factor * length / max_position - (factor - 1))
    return dict(ntk_base=ntk_base, dynamic_base=dynamic_base)


def dynamic(scale, below=True):
    def dynamic_base(theta, head_dim, factor, length, max_position):
        if below and length <= max_position:
            return theta
        return solutions.ntk_base(theta, head_dim, scale(factor, length / max_position))
    return dict(dynamic_base=dynamic_base)


MISTAKES = {
    "mup_table": {
        "std divided by m": mup(std=1),
        "learning rate divided by sqrt(m)": mup(lr=0.5),
        "learning rate not scaled": mup(lr=0),
        "2 branches per layer under the root": mup(residual=2),
        "the embedding scaled as a matrix": mup(embedding=0.5),
        "logits divided by sqrt(m)": mup(head=0.5),
        "the base is always 256": mup(ignore_base=True)},
    "lr_at": {
        "the formula as printed, not counted from the decay": rate(printed=True),
        "a first update without a rate": rate(warmed=0),
        "e in place of 1/2": rate(half=np.exp(-1)),
        "the decay one update early": rate(start=1),
        "below the floor": rate(keep_floor=False)},
    "fit_law": {
        "no irreducible loss": dict(fit=fit_without_constant),
        "one exponent for both terms": dict(fit=fit_one_exponent),
        "C = N D": split(six=1),
        "N and D swapped": split(swap=True),
        "alpha in place of beta in the exponent": split(share=lambda alpha, beta: alpha
                                                        / (alpha + beta)),
        "K upside down": split(inverse=-1)},
    "parabola": {
        "a parabola of the rate": vertex(axis=np.asarray, back=np.asarray),
        "the lowest of the rates that ran": dict(best_rate=lowest_point),
        "the three lowest points": vertex(points=3),
        "a minimum outside of the rates": vertex(refuse=False),
        "a maximum": vertex(downwards=True),
        "the vertex of the averaged losses": dict(over_seeds=seeds_averaged),
        "refused by the lowest point": dict(best_rate=refused_by_the_lowest_point),
        "the mean of the rates": spread(mean=np.mean),
        "a spread that is no factor": spread(deviation=lambda v: v.std(ddof=1)),
        "divided by S": spread(deviation=lambda v: np.exp(np.log(v).std()))},
    "dpo_loss": {
        "the rejected answer preferred": preference(lambda p, r, beta: -right_margin(p, r, beta)),
        "no reference": preference(lambda p, r, beta: beta * (p[:, 0] - p[:, 1])),
        "beta on the chosen answer alone": preference(lambda p, r, beta: beta * (p - r)[:, 0]
                                                      - (p - r)[:, 1]),
        "log of the sigmoid": preference(right_margin, lambda x: x.sigmoid().log()),
        "the mean over pairs": preference(right_margin, mean=True),
        "log of the softmax": dict(answer_logp=naive_logp),
        "no gradient": dict(answer_logp=lambda *given: solutions.answer_logp(*given).detach()),
        "the mean over tokens": logp(reduce=torch.mean),
        "a token predicted by its own logits": logp(shift=0),
        "the prompt counted": logp(masked=False)},
    "routing": {
        "weights not divided by their sum": route(renormalize=False),
        "the less probable first": route(ascending=True),
        "weights without a gradient": route(detach=True),
        "only the first choice counted": balance(choices=1, per=1),
        "counts divided by T": balance(per=1),
        "no factor E": balance(factor=False),
        "P of chosen experts only": balance(p=chosen_only),
        "P from the logits": balance(p=lambda logits: logits),
        "no gradient": balance(detach=True)},
    "ntk_base": {
        "theta s, a larger base alone": base(lambda dim: 1),
        "the exponent upside down": base(lambda dim: (dim - 2) / dim),
        "counted in pairs": base(lambda dim: dim / 2 / (dim / 2 - 2) if dim > 4 else 2),
        "s = length / max_position": dynamic(lambda factor, ratio: ratio),
        "s = factor length / max_position": dynamic(lambda factor, ratio: factor * ratio),
        "smaller than theta for short inputs": dynamic(
            lambda factor, ratio: max(1e-3, factor * ratio - factor + 1), below=False),
        "smaller than theta just below max_position": dict(dynamic_base=shrinking_base),
        "exponents i / D": dict(
            frequencies=lambda theta, dim: [theta ** (-i / dim) for i in range(dim // 2)]),
        "the slowest first": dict(
            frequencies=lambda theta, dim: solutions.frequencies(theta, dim)[::-1])},
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_typical_mistakes_are_rejected_with_a_message_that_says_what_was_expected(name):
    assert len(MISTAKES[name]) >= 2
    for mistake, functions in MISTAKES[name].items():
        found = failures(name, with_mistake(**functions))
        assert found, f"{name}: {mistake} is accepted"
        assert all(re.search(r": expected ", message)
                   for message in found.values()), (mistake, found)


# ---- the syllabus

PAGE = "labs/syllabus.md"
FORMS = [*course.LABS, *({"continue_training", "budget"} - course.LABS.keys())]


@pytest.mark.parametrize("page", [PAGE, "labs/assignments/README.md", "labs/solutions/README.md"])
def test_what_the_pages_name_exists(page, monkeypatch):
    """Paths, links with their anchors, code and options: the test of README and docs."""
    monkeypatch.setattr(test_scripts, "FOREIGN_OPTIONS",
                        {*test_scripts.FOREIGN_OPTIONS, "adapters", "tb"})
    test_scripts.test_every_path_name_link_and_option_exists(page)
    assert set(re.findall(r"python -m labs\.(\w+)",
                          test_scripts.text_of(page))) <= course.LABS.keys()
    for path in re.findall(r"python -m pytest ([\w/.]+)", test_scripts.text_of(page)):
        assert (ROOT / path).exists(), path


def test_twelve_weeks_have_readings_labs_assignments_and_hours_that_add_up():
    text = test_scripts.text_of(PAGE)
    rows = re.findall(r"^\| (\d+) \| \[[^]]*\]\(syllabus.md#week-(\d+)[^)]*\) "
                      r"\|(.*)\| ([\d, ]+) \| (\d+) \|$", text, re.M)
    assert [(int(week), int(anchor)) for week, anchor, *_ in rows] == [(i, i) for i in range(1, 13)]
    assert all(sum(map(int, parts.split(", "))) == int(hours) for *_, parts, hours in rows)
    assert f"In all {sum(int(row[-1]) for row in rows)} hours" in text
    weeks = re.split(r"^## ", text, flags=re.M)
    for week in (part for part in weeks if part.startswith("Week ")):
        assert all(f"**{part}**" in week
                   for part in ("Read", "Mathematics", "Lab", "In class")), week[:40]
        assert all(f"{i}. " in week.split("**In class**")[1] for i in (1, 2, 3, 4)), week[:40]
    table = " ".join(row[2] for row in rows)
    assert all(lab in table for lab in FORMS)
    assert re.findall(r"(\d) \[\w+\]\(assignments/(\w+)\.py\)",
                      table) == [(str(list(ASSIGNMENTS).index(name) + 1), name)
                                 for name in sorted(ASSIGNMENTS,
                                                    key=lambda name: table.index(f"/{name}.py"))]


def test_every_lab_has_three_questions_before_and_three_after():
    forms = test_scripts.text_of(PAGE).split("## The questions of each lab")[1].split("\n### ")[1:]
    assert sorted(form.split("\n")[0] for form in forms) == sorted(FORMS)
    for form in forms:
        before, after = form.split("| after | |")
        for half in (before, after):
            assert re.findall(r"^\| (\d) \| .*[?.)] \|$", half, re.M) == ["1", "2", "3"], form[:30]


def test_the_teacher_has_notes_for_every_question_and_every_class():
    first_hour, *forms = test_scripts.text_of("labs/solutions/forms.md").split("\n## ")[1:]
    assert first_hour.count("(a)") == first_hour.count("(b)") == 5
    assert sorted(form.split("\n")[0] for form in forms) == sorted(FORMS)
    for form in forms:
        before, after = form.split("\n**After**\n")
        assert all(re.findall(r"^(\d)\. ", half, re.M) == ["1", "2", "3"]
                   for half in (before, after)), form[:30]
    assert not any("TODO" in form for form in forms)
    weeks = re.findall(r"^## (Week \d+: .*)$", test_scripts.text_of(PAGE), re.M)
    classes = test_scripts.text_of("labs/solutions/classes.md").split("\n## ")[1:]
    assert [notes.split("\n")[0] for notes in classes] == weeks and len(weeks) == 12
    for notes in classes:
        assert re.findall(r"^(\d)\. \*\*", notes, re.M) == ["1", "2", "3", "4"], notes[:30]

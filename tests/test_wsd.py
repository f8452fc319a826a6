"""Schedules at their ends, MiniCPM's own numbers, and the figure."""
import math

import pytest

import wsd
from wsd import DECAYS, lr_at

PEAK, FLOOR = 0.01, 0.001


def rates(max_steps, first=0, past=0, **options):
    """The learning rate of every update of a run, and `past` more."""
    options = {"peak": PEAK, "floor": FLOOR, "warmup": 0, "decay_steps": 0, "max_steps": max_steps,
               **options}
    return [lr_at(step, **options) for step in range(first, max_steps + past)]


def test_warmup():
    assert rates(
        20, warmup=4)[:6] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK, PEAK])
    assert rates(20, warmup=1) == rates(20, warmup=0) == [PEAK] * 20
    for schedule in ("wsd", "cosine", "cosine_loop", "constant"):
        first = rates(20, warmup=4, decay_steps=5 if schedule == "wsd" else 0, schedule=schedule)
        assert 0 < first[0] == PEAK / 4 and max(
            first) == first[3] == PEAK, "step 0 is not wasted, and the peak is met"
        assert rates(20, schedule=schedule)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("decay_steps", [1, 2, 7, 30])
def test_a_decay_falls_from_the_peak_to_exactly_the_floor(decay, decay_steps):
    """30 of 30 steps: all decay, no stable stage. With one step there is only the floor."""
    all_rates = rates(30, past=3, decay_steps=decay_steps, decay=decay)
    stable, falling, after = all_rates[
        :30 - decay_steps], all_rates[30 - decay_steps:30], all_rates[30:]
    assert stable == [PEAK] * len(stable)
    assert falling[-1] == FLOOR and after == [FLOOR] * 3
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == decay_steps
    if decay_steps > 1:
        assert falling[0] == pytest.approx(PEAK, rel=1e-12)
    assert rates(30, first=25, decay_steps=decay_steps,
                 decay=decay) == all_rates[25:30], "a rate depends on its step alone"


def test_the_forms_of_the_decay():
    """Half-way, against formulas written out; linear and cosine also reach a floor of zero."""
    middle = {decay: rates(21, decay_steps=21, decay=decay)[10] for decay in DECAYS}
    assert middle["linear"] == pytest.approx((PEAK + FLOOR) / 2) == middle["cosine"]
    assert middle["exponential"] == pytest.approx(math.sqrt(PEAK * FLOOR))
    assert middle["1-sqrt"] == pytest.approx(FLOOR + (PEAK - FLOOR) * (1 - math.sqrt(0.5)))
    assert rates(21, decay_steps=21, decay="cosine")[5] == pytest.approx(
        FLOOR + (PEAK - FLOOR) * (2 + math.sqrt(2)) / 4)
    for decay in ("linear", "cosine", "1-sqrt"):
        assert rates(21, decay_steps=21, decay=decay, floor=0)[-1] == 0
    # unset half-life: length / log2(peak / floor)
    halved = rates(21, decay_steps=21, floor=PEAK / 16)
    assert halved[::5] == pytest.approx([PEAK, PEAK / 2, PEAK / 4, PEAK / 8, PEAK / 16])


def test_the_schedule_of_minicpm_2b():
    """Section 6.2: decay from step 261,000, halved every 5,000. The formula as printed there would
    exceed the peak."""
    def production(step):
        return lr_at(step, peak=1e-2, floor=0, warmup=2000, max_steps=279_500, decay_steps=18_500,
                     half_life=5000)

    assert production(2000) == production(260_999) == production(261_000) == 1e-2
    assert production(266_000) == pytest.approx(5e-3, rel=1e-12)
    assert production(271_000) == pytest.approx(2.5e-3, rel=1e-12)
    assert production(261_000 + 16_610) == pytest.approx(1e-3, rel=1e-4)
    assert production(279_499) == pytest.approx(7.7e-4, rel=2e-3)
    tail = [production(step) for step in range(261_000, 279_500, 100)]
    assert tail == sorted(tail, reverse=True)


def test_a_half_life_that_is_given_stops_at_the_floor():
    falling = rates(40, decay_steps=40, half_life=5)
    assert falling[5] == pytest.approx(PEAK / 2) and falling[15] == pytest.approx(PEAK / 8)
    assert falling[20:] == [FLOOR] * 20
    assert rates(40, decay_steps=10, half_life=100)[-1] > PEAK * 0.9


def test_cosine_and_constant():
    falling = rates(21, past=3, schedule="cosine")
    assert falling[:11:10] == pytest.approx([PEAK, (PEAK + FLOOR) / 2])
    assert falling[20:] == [FLOOR] * 4 and falling == sorted(falling, reverse=True)
    assert rates(1, schedule="cosine") == [FLOOR]
    loop = rates(21, past=20, schedule="cosine_loop")
    assert loop[:20] == pytest.approx(falling[:20]) and loop == pytest.approx(loop[::-1])
    assert loop[40] == pytest.approx(PEAK)
    assert rates(21, past=20, schedule="constant") == [PEAK] * 41


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "cosine_loop", "constant"])
def test_a_horizon_that_is_not_settled_stays_at_the_peak(schedule):
    at = [lr_at(step, peak=PEAK, floor=FLOOR, warmup=2, max_steps=math.inf, decay_steps=0,
                schedule=schedule) for step in (0, 1, 2, 10 ** 9)]
    assert at == pytest.approx([PEAK / 2, PEAK, PEAK, PEAK], rel=1e-12)


def test_a_branch_warms_up_again_from_its_start():
    again = rates(30, first=10, start=10, warmup=4, decay_steps=10)
    assert again[:5] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])
    assert again[4:] == rates(30, first=14, decay_steps=10)


def test_main_draws_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wsd.main([f"--out={tmp_path / 'figure.png'}"])
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert capsys.readouterr().out == f"drew {tmp_path / 'figure.png'}\n"
    for out, said in (("figure.exe", "--out=figure.exe: must end in .png, .pdf or .svg"),
                      ("no/such/a.png", "no/such/a.png: No such file"),
                      ("", "--out needs a value: --out=VALUE")):
        with pytest.raises(SystemExit, match="^2$"):
            wsd.main([f"--out={out}"])
        assert (error := capsys.readouterr().err).startswith(said) and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]

"""The scaling law on losses made by a known one: constants, held-out error, bands, prediction, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.torch import save_file
from torch import zeros
from typer.testing import CliRunner

from cast_train import scaling_law as scaling_law_module
from cast_train.cli import scaling_law
from cast_train.run_records import read_records
from cast_train.scaling_law import Fit, RunRecord, ScalingLaw, fit_scaling_law
from cast_train.scaling_report import summary
from conversion.errors import InputError

TRUTH = ScalingLaw(irreducible=1.69, size_factor=406.4, alpha=0.34, token_factor=410.7, beta=0.28)
SIZES, BUDGETS = (1e8, 4e8, 1.6e9, 7e9), (2e8, 1e9, 5e9, 3e10)


def runs(noise: float, sizes: tuple[float, ...] = SIZES, budgets: tuple[float, ...] = BUDGETS) -> list[RunRecord]:
    generator = np.random.default_rng(5)
    return [
        RunRecord(
            name=f"{size:g}-{budget:g}",
            parameters=size,
            tokens=budget,
            loss=TRUTH.loss(size, budget) * math.exp(generator.normal(0, noise)),
        )
        for size in sizes
        for budget in budgets
    ]


@pytest.fixture(scope="module")
def noisy() -> Fit:
    return fit_scaling_law(runs(0.003), bootstraps=60)


def test_constants_are_recovered_from_exact_losses() -> None:
    law = fit_scaling_law(runs(0.0), bootstraps=1).law
    for name in ("irreducible", "size_factor", "alpha", "token_factor", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=0.01), name


def test_noisy_losses_give_the_law_within_its_bands(noisy: Fit) -> None:
    assert noisy.law.alpha == pytest.approx(TRUTH.alpha, abs=0.05)
    assert noisy.law.beta == pytest.approx(TRUTH.beta, abs=0.03)
    covered = 0
    places = [(size, budget) for size in SIZES for budget in (*BUDGETS, 1e11)]
    for size, budget in places:
        band = noisy.loss(size, budget)
        assert band.low <= band.value <= band.high
        assert band.high / band.low < 1.03
        covered += band.low <= TRUTH.loss(size, budget) <= band.high
    assert covered >= 0.7 * len(places)  # 90 % is meant, and neighbouring places err together


def test_bands_hold_the_truth_nine_times_in_ten_however_few_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a law of one constant, fitted by the mean of log loss, so that the right coverage is known.

    Four runs leave three degrees of freedom: bands that took the residuals' size for the noise's would hold the truth
    in P(|t3| < 1.645) = 80 % of all series.
    """

    def mean(records: list[RunRecord], starts: list[ScalingLaw]) -> ScalingLaw:
        return ScalingLaw(math.exp(sum(math.log(record.loss) for record in records) / len(records)), 0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(scaling_law_module, "_fit", mean)
    monkeypatch.setattr(scaling_law_module, "_constants", lambda records: 1)
    generator = np.random.default_rng(0)
    covered = []
    for seed in range(400):
        losses = 3.0 * np.exp(generator.normal(0, 0.003, 4))
        records = [RunRecord(name="", parameters=1e8, tokens=10.0**i, loss=loss) for i, loss in enumerate(losses)]
        band = fit_scaling_law(records, bootstraps=100, seed=seed).loss(1e8, 1e9)
        covered.append(band.low <= 3.0 <= band.high)
    assert np.mean(covered) == pytest.approx(0.9, abs=0.04)


def test_the_largest_run_is_predicted_from_the_others(noisy: Fit) -> None:
    assert noisy.heldout is not None
    assert (noisy.heldout[0].parameters, noisy.heldout[0].tokens) == (7e9, 3e10)
    assert noisy.heldout_error == pytest.approx(0, abs=0.015)


def test_one_bad_run_does_not_bend_the_law() -> None:
    records = runs(0.0)
    records[5] = records[5].model_copy(update={"loss": records[5].loss * 1.3})
    law = fit_scaling_law(records, bootstraps=1).law
    assert law.loss(7e9, 3e10) == pytest.approx(TRUTH.loss(7e9, 3e10), rel=0.01)


def test_one_size_is_fitted_over_tokens_alone() -> None:
    fit = fit_scaling_law(runs(0.0, sizes=(1e8,), budgets=(1e7, 1e8, 1e9, 1e10, 1e11)), bootstraps=5)
    assert fit.law.size_factor == 0
    assert fit.law.irreducible == pytest.approx(TRUTH.limit(1e8), rel=0.01)
    assert fit.law.beta == pytest.approx(TRUTH.beta, rel=0.01)
    assert fit.heldout_error == pytest.approx(0, abs=0.005)


def test_tokens_to_match_dense_are_where_the_law_says(noisy: Fit) -> None:
    target = TRUTH.loss(1e8, 1e11)
    needed = noisy.tokens_for(1e8, target)
    assert needed.low < needed.value < needed.high
    assert needed.low / 1.5 < 1e11 < needed.high * 1.5
    assert TRUTH.tokens_for(1e8, target) == pytest.approx(1e11)
    assert f"{needed.value:.3g} tokens to match it" in summary(noisy, {1e8: target})


def test_a_dense_model_below_the_limit_is_not_reachable(noisy: Fit) -> None:
    text = summary(noisy, {1e8: 0.9 * TRUTH.limit(1e8)})
    assert "not reachable by this fit" in text
    assert "0 of 60 bootstraps" in text


@pytest.mark.parametrize(
    ("sizes", "budgets", "match"),
    [
        ((1e8,), (1e9, 1e10), "different token counts of the runs: 2"),
        ((1e8,), (1e8, 1e9, 1e10), "3 runs are too few for the 3 constants of the law: give 4"),
        ((1e8, 1e9), BUDGETS, "two model sizes"),
    ],
)
def test_too_few_runs_are_refused(sizes: tuple[float, ...], budgets: tuple[float, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        fit_scaling_law(runs(0.0, sizes, budgets))


def test_where_none_can_be_spared_nothing_is_held_out() -> None:
    fit = fit_scaling_law(runs(0.0, (1e8,), (1e7, 1e8, 1e9, 1e10)), bootstraps=2)
    assert fit.heldout is None
    assert "too few runs to leave the largest one out" in summary(fit, {})


def evaluation(root: Path, *, context: int = 1024, method: str | None = None) -> Path:
    """What cast eval --json says of a dense model, five runs of it, and a model that cast train did not make."""
    models = {}
    for name, tokens in {"dense": 0, "other": 0, **{f"run{i}": 10**i for i in range(6, 11)}}.items():
        directory = root / name
        directory.mkdir(exist_ok=True)
        save_file({"weight": zeros(10, 20), "bias": zeros(5)}, directory / "model.safetensors")
        loss = 3.0 if not tokens else 2.9 + 40 * tokens**-0.25
        models[str(directory)] = {"perplexity": math.exp(loss), "tokens": 5000, "context": context}
        if tokens:
            summary = {"source": str(root / "dense"), "trained_tokens": tokens} | ({"method": method} if method else {})
            (directory / "training.json").write_text(json.dumps(summary))
    path = root / f"eval-{context}.json"
    path.write_text(json.dumps({"models": models, "data": "heldout.jsonl"}))
    return path


def test_evaluations_become_records(tmp_path: Path) -> None:
    found = read_records([evaluation(tmp_path)])
    assert [(run.parameters, run.tokens) for run in found.runs] == [(205, 10**i) for i in range(6, 11)]
    assert found.dense == {205: pytest.approx(3.0)}


def test_the_command_fits_draws_and_predicts(tmp_path: Path) -> None:
    evaluation(tmp_path)
    app = typer.Typer()
    app.command()(scaling_law)
    result = CliRunner().invoke(app, [str(tmp_path / "eval-1024.json"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert "tokens to match it" in result.stdout
    assert (tmp_path / "out" / "scaling-law.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "scaling-law.json").read_text())
    assert written["law"]["E"]["value"] == pytest.approx(2.9, rel=0.01)
    assert written["match_dense"][0]["tokens"]["value"] == pytest.approx((40 / 0.1) ** 4, rel=0.1)


def test_plain_records_are_read(tmp_path: Path) -> None:
    rows = [{"name": "a", "parameters": 10, "tokens": 1e6, "perplexity": 20.0}]
    (tmp_path / "plain.json").write_text(
        json.dumps([*rows, {"name": "dense", "parameters": 10, "tokens": None, "perplexity": 10.0}])
    )
    found = read_records([tmp_path / "plain.json"])
    assert found.runs == [RunRecord(name="a", parameters=10, tokens=1e6, loss=math.log(20.0))]
    assert found.dense == {10: math.log(10.0)}


def test_records_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = [evaluation(tmp_path), evaluation(tmp_path, context=512)]
    with pytest.raises(InputError, match="different text"):
        read_records(paths)
    with pytest.raises(InputError, match="no run of method ast"):
        read_records(paths[:1], "ast")
    (tmp_path / "broken.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="no perplexities"):
        read_records([tmp_path / "broken.json"])
    with pytest.raises(InputError, match="no JSON file"):
        read_records([tmp_path / "none.json"])

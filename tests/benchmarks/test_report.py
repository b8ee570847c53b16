"""Numbers of the report against independent ones, and the page against what it promises."""

import base64
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.load.measurements import BenchResult, RequestSample
from benchmarks.report.quality import Quality
from benchmarks.report.render import render, write_report
from benchmarks.report.statistics import METRICS, Spread, errors, percentiles, ratios, throughput, values
from benchmarks.report.summary import summary_table
from conversion.errors import InputError
from tests.benchmarks.synthetic import SPEEDUP, result

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
QUALITY = {
    "models/dense": {"perplexity": 20.0, "tokens": 50176, "context": 1024},
    "cast": {"perplexity": 27.5, "tokens": 50176, "context": 1024},
}


def quality(tmp_path: Path) -> Quality:
    path = tmp_path / "quality.json"
    path.write_text(json.dumps({"models": QUALITY}))
    return Quality.read(path)


def test_percentiles_interpolate_between_ranks() -> None:
    numbers = [float(n) for n in range(101)]
    assert percentiles(numbers[::-1]) == {50: 50.0, 90: 90.0, 99: 99.0}
    assert percentiles([1.0, 2.0]) == pytest.approx({50: 1.5, 90: 1.9, 99: 1.99})


def test_time_per_output_token_leaves_out_the_first() -> None:
    sample = RequestSample(
        concurrency=1, start_s=0, end_to_end_s=9.0, ttft_s=5.0, gaps_s=[1.0, 2.0, 1.0], completion_tokens=5
    )
    assert sample.tpot_s == 1.0  # 4 s for 4 more tokens, though two of them came in one chunk


def test_ratios_pair_rounds() -> None:
    measured = result()
    for concurrency, speedup in SPEEDUP.items():
        found = {ratio.name: ratio for ratio in ratios(measured, concurrency)}
        assert found["tokens/s"].spread.median == pytest.approx(speedup)
        for name in ("TTFT", "TPOT", "End to end"):
            spread = found[name].spread
            # every round is 1 % slower than the last one for both, which cancels within a pair
            assert (spread.low, spread.median, spread.high) == pytest.approx((1 / speedup,) * 3)
        verdicts = {ratio.verdict for ratio in found.values()}
        assert verdicts == {"better" if speedup > 1 else "worse"}


def test_throughput_is_tokens_over_time() -> None:
    spread = throughput(result(), "dense", 1)
    assert (spread.low, spread.median, spread.high) == pytest.approx((100 / 1.02, 100 / 1.01, 100))


@pytest.mark.parametrize(
    ("spread", "higher", "lower"),
    [
        (Spread(1.2, 1.1, 1.3), "better", "worse"),
        (Spread(0.8, 0.7, 0.9), "worse", "better"),
        (Spread(1, 0.9, 1.1),) + ("even",) * 2,
    ],
)
def test_verdict_needs_all_rounds_on_one_side(spread: Spread, higher: str, lower: str) -> None:
    assert spread.verdict(higher_is_better=True) == higher
    assert spread.verdict(higher_is_better=False) == lower


def test_failed_requests_are_left_out_of_times_and_listed() -> None:
    measured = result()
    sample = measured.rounds[0].levels[0].samples[0]
    sample.error, sample.ttft_s = "broken", 99.0
    assert errors(measured, "dense") == ["broken"]
    assert errors(measured, "sparse") == []
    assert max(values(measured.levels_of("dense", 1), METRICS[0])) < 1
    assert "1 failed requests, the first: broken" in render(measured)


def test_page_shows_the_numbers_and_loads_nothing(tmp_path: Path) -> None:
    curve = tmp_path / "training.png"
    curve.write_bytes(PNG)
    page = render(result(), quality(tmp_path), curve)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)))
    for expected in ("2.00× 2.00–2.00", "510.0 → 310.0 MB", "27.50", "1.38×", "210 sparse linears", "Test CPU"):
        assert expected in text
    assert "Sparse loses here: tokens/s at 4 (0.50×)" in text
    assert page.count("<svg") == 6
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "://" not in without_namespaces
    assert "<script" not in page
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_written_measurements_read_back(tmp_path: Path) -> None:
    measured = result()
    report = write_report(measured, tmp_path)
    assert report.read_text().startswith("<!DOCTYPE html>")
    assert BenchResult.model_validate_json((tmp_path / "bench.json").read_bytes()) == measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "report.html"]


def test_measurements_are_kept_whatever_becomes_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PNG file"):
        write_report(result(), tmp_path, training_curve=tmp_path / "none.png")
    assert BenchResult.model_validate_json((tmp_path / "bench.json").read_bytes()) == result()


def test_a_model_without_weight_files_has_no_ratio_of_sizes() -> None:
    measured = result()
    measured.models["dense"].disk_bytes = 0
    assert '<div class="ratio worse">–</div>' in render(measured)


def test_models_of_the_same_name_are_named_in_full(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    one = {"tokens": 1, "context": 1}
    names = ("models/cast", "demo/cast", "models/dense")
    path.write_text(json.dumps({"models": {name: one | {"perplexity": len(name)} for name in names}}))
    found = Quality.read(path)
    assert {name: model.perplexity for name, model in found.models.items()} == {
        "models/cast": 11,
        "demo/cast": 9,
        "dense": 12,
    }


def test_table_shows_quality_size_and_speed(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=(tmp_path / "table").open("w"))
    console.print(summary_table(result(), quality(tmp_path)))
    table = console.export_text()
    for expected in ("27.50", "510.0 MB", "310.0 MB", "0.61", "2.00 (2.00–2.00)", "TTFT p50"):
        assert expected in table


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for text in ("{}", '{"models": {}}'):
        other.write_text(text)
        with pytest.raises(InputError, match="no output of `cast eval"):
            Quality.read(other)
    with pytest.raises(InputError, match="no PNG file"):
        render(result(), training_curve=other)

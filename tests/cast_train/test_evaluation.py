"""`cast eval` says what transformers and lm-eval say."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from cast_train.evaluation import agreement, perplexity, windows
from cast_train.evaluation.evaluate import evaluate, print_results, write_results
from cast_train.evaluation.perplexity import score_windows
from cast_train.evaluation.windows import heldout_windows
from cast_train.evaluation.zero_shot import Tasks
from conversion.errors import InputError
from conversion.pack import save_packed
from tests.cast_train.tiny import save_model, write_text


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)} | {"?": 50}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tiny_model(seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=51, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def test_perplexity_is_what_plain_transformers_gives_to_the_last_digit(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", characters=700)
    (result,) = evaluate([directory], text, 64, 640)["models"].values()

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(text.read_text(), add_special_tokens=False)["input_ids"]
    losses = []
    with torch.no_grad():
        for start in range(0, 640, 64):
            window = torch.tensor([ids[start : start + 64]])
            log_probs = torch.log_softmax(model(window).logits[0, :-1], dim=-1)
            losses.append(-log_probs.gather(1, window[0, 1:, None]).double().sum().item())
    assert result["perplexity"] == math.exp(sum(losses) / (10 * 63))
    assert (result["tokens"], result["context"]) == (10 * 63, 64)


def test_windows_are_cut_from_joined_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(f"w{(i * i + j) % 50}" for i in range(37)) for j in range(5)]
    windows = heldout_windows(texts, tokenizer, context=16, tokens=170)
    assert windows.shape == (10, 16)  # 170 of the 185 tokens, whole windows only
    model = tiny_model(0)
    with torch.no_grad():
        losses = [model(w[None], labels=w[None]).loss.double().item() for w in windows]
    assert score_windows(model, windows).perplexity == pytest.approx(math.exp(sum(losses) / 10), rel=1e-6)


def test_of_endless_text_no_more_is_read_than_the_windows_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its tokens are those of all the text, also where nothing ends a token but what is likely: BPE over blanks."""
    backend = Tokenizer(models.BPE())
    generator = random.Random(0)
    words = ["".join(generator.choices("abc", k=generator.randint(1, 3))) for _ in range(40)]
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 300))) for _ in range(100)]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    everything = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(windows, "_MARGIN", 64)
    monkeypatch.setattr(windows, "_CHARACTERS", 1)  # so that more is read when that was not enough
    for tokens in (*range(140, 220, 2), 1000, len(everything) + 1):
        read: list[int] = []
        found = heldout_windows((read.append(i) or text for i, text in enumerate(texts)), tokenizer, 2, tokens)
        assert found.flatten().tolist() == everything[: min(tokens, len(everything)) // 2 * 2]
        assert len(read) == 100 if tokens > len(everything) else len(read) < 80
    assert len(heldout_windows(itertools.repeat("abc"), tokenizer, 16, 160)) == 10


def test_several_models_read_a_stream_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, text = save_model(tmp_path / "model"), write_text(tmp_path / "text.txt", characters=400).read_text()
    expected = evaluate([directory], tmp_path / "text.txt", 32, 320)["models"][str(directory)]

    def endless(data: list[Path]) -> Iterator[str]:
        read.append(data)
        yield text
        yield from itertools.repeat("more")

    read: list[list[Path]] = []
    monkeypatch.setattr("cast_train.evaluation.evaluate.read_documents", endless)
    other = shutil.copytree(directory, tmp_path / "other")
    results = evaluate([directory, other], Path("stream"), 32, 320, teacher=directory)["models"]
    assert len(read) == 1
    assert [result["perplexity"] for result in results.values()] == [expected["perplexity"]] * 2


def test_windows_are_no_longer_than_any_models_context(tmp_path: Path) -> None:
    short = save_model(tmp_path / "short", "gpt2")  # 64 positions, and a 65th would be out of its table
    text = write_text(tmp_path / "text.txt", characters=400)
    (result,) = evaluate([short], text, None, 200)["models"].values()
    assert result["context"] == 64
    assert result["tokens"] == 3 * 63
    with pytest.raises(InputError, match="short has a context of 64 tokens"):
        evaluate([short], text, 65, 200)


def test_text_shorter_than_a_window_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="3 tokens, less than one window of 16"):
        heldout_windows(["w1 w2 w3"], tokenizer, context=16, tokens=100)


@pytest.mark.parametrize("chunk", [51 * 4, 1 << 23])
def test_agreement_is_kl_from_the_teacher_and_equal_argmax(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(agreement, "CHUNK_LOGITS", chunk)  # 4 positions at a time, or all at once
    monkeypatch.setattr(perplexity, "CHUNK_LOGITS", chunk)
    student, teacher = tiny_model(0), tiny_model(1)
    windows = torch.randint(0, 51, (3, 16), generator=torch.Generator().manual_seed(0))
    score = score_windows(student, windows, teacher)
    with torch.no_grad():
        p = teacher.double()(windows).logits[:, :-1].log_softmax(-1)
        q = student.double()(windows).logits[:, :-1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert kl > 1e-3
    assert score.kl == pytest.approx(kl.item(), rel=1e-4)
    assert score.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert score.perplexity == pytest.approx(math.exp(-q.gather(-1, windows[:, 1:, None]).mean().item()), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "granite"])  # Granite's logits are divided by a number
def test_a_model_agrees_with_itself(family: str, tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", family)
    text = write_text(tmp_path / "text.txt", characters=400)
    (result,) = evaluate([directory], text, 32, 320, teacher=directory)["models"].values()
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["top1"] == 1.0


def test_a_teacher_with_other_tokens_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="other tokens"):
        evaluate([directory], write_text(tmp_path / "text.txt", characters=400), 32, 320, teacher=other)


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """Two local tasks of multiple choice, as `python -m benchmarks.registry zero-shot` lays them out."""
    directory = tmp_path / "tasks"
    for name, count in (("colours", 12), ("letters", 7)):
        (directory / name).mkdir(parents=True)
        rows = [{"question": f"item {i}?", "options": [f"a{i}", f"bb {i}", "c"], "gold": i % 3} for i in range(count)]
        (directory / name / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task: dict[str, Any] = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}/data.json"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (directory / name / f"{name}.yaml").write_text(json.dumps(task))
    return directory


def test_zero_shot_accuracy_is_lm_evals(tmp_path: Path, task_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    directory = save_model(tmp_path / "model")
    results = evaluate([directory], tasks=Tasks(directory=task_dir, limit=10))
    found = results["models"][str(directory)]["zero_shot"]

    monkeypatch.chdir(task_dir)
    plain = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=["colours", "letters"],
        task_manager=TaskManager(include_path=".", include_defaults=False),
        batch_size=8,
        device="cpu",
        limit=10,
        bootstrap_iters=10,
    )
    for name, items in (("colours", 10), ("letters", 7)):
        assert found["tasks"][name]["acc"] == plain["results"][name]["acc,none"]
        assert found["tasks"][name]["stderr"] == pytest.approx(plain["results"][name]["acc_stderr,none"])
        assert found["tasks"][name]["items"] == items
    assert found["mean"] == pytest.approx(sum(task["acc"] for task in found["tasks"].values()) / 2)
    assert results["tasks"] == {"directory": str(task_dir), "limit": 10, "few_shot": 0}
    assert results["versions"]["lm-eval"] == lm_eval.__version__


def test_a_packed_directory_scores_as_its_model(
    tmp_path: Path, task_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conversion.models import CONFIGS, make_model

    sparse, packed = tmp_path / "sparse", tmp_path / "packed"
    save_model(sparse)
    make_model(CONFIGS["llama"], sparse=True).save_pretrained(sparse)
    save_packed(sparse, packed)
    text = write_text(tmp_path / "text.txt", characters=400)
    results = evaluate([sparse, packed], text, 32, 320, teacher=sparse, tasks=Tasks(("letters",), task_dir))
    of_sparse, of_packed = results["models"].values()
    assert of_sparse == of_packed
    assert list(of_packed["zero_shot"]["tasks"]) == ["letters"]
    write_results(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    print_results(results)
    printed = capsys.readouterr().out
    assert f"{of_packed['perplexity']:.2f}" in printed
    assert f"{of_packed['zero_shot']['mean']:.2%}" in printed


def test_what_cannot_be_evaluated_is_said(tmp_path: Path, task_dir: Path) -> None:
    directory = save_model(tmp_path / "model")
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate([directory])
    with pytest.raises(InputError, match="no task 'shapes'"):
        evaluate([directory], tasks=Tasks(("shapes",), task_dir))
    (task_dir / "letters" / "data.json").unlink()
    with pytest.raises(InputError, match="could not be loaded"):
        evaluate([directory], tasks=Tasks(("letters",), task_dir))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no task"):
        evaluate([directory], tasks=Tasks(directory=tmp_path / "empty"))


def test_a_model_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    text = write_text(tmp_path / "text.txt", characters=400)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer of .*model cannot be read"):
        evaluate([model], text, None, 200)
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="model holds no tokenizer"):
        evaluate([model], text, None, 200)

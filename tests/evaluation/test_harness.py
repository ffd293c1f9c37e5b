"""lm-evaluation-harness through our adapter gives what it gives through its own transformers model."""

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import teal.transformers
from teal.calibration.thresholds import Settings, calibrate
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.cli import evaluate as evaluate_cli
from teal.errors import UserError
from teal.evaluation import harness
from teal.evaluation.harness import run_tasks
from teal.plan import SparsityPlan, keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import TEXT, run_command
from tests.evaluation.test_evaluation import InvokeMain, call  # noqa: F401 - a fixture

CPU = torch.device("cpu")
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Three tasks, one for each kind of request, on documents made here."""
    words = TEXT.split()
    documents = [
        {"question": " ".join(words[i : i + 6]), "choices": [f" {words[i]}", f" {words[i + 1]}", " x"], "answer": i % 3}
        for i in range(12)
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for name, body in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'docs.jsonl'}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{files}{body}")
    return tmp_path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def only_local_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness' own tasks, which take 5 s to find, are left out."""
    monkeypatch.setattr(harness, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def hf_results(folder: Path, tasks: Path, plan: SparsityPlan | None = None) -> dict[str, float]:
    """What the harness measures through transformers, with every token sparse if there is a plan."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if plan is not None:
        teal.transformers.sparsify(model, plan, prompts="sparse")
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=400)
    output = lm_eval.simple_evaluate(
        model=reference, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False)
    )
    return {
        f"{task}/{name.split(',')[0]}": float(value)
        for task, metrics in output["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }


@pytest.mark.usefixtures("only_local_tasks")
def test_results_equal_the_harness_own_model(tiny_folder: Path, task_folder: Path) -> None:
    expected = hf_results(tiny_folder, task_folder)
    assert len(expected) >= 5
    model = load_model(tiny_folder, CPU, torch.float32)
    sparsify(model, keep_all_plan(model.config))
    actual = run_tasks(model, load_tokenizer(tiny_folder), list(TASKS), 0.0, None, task_folder)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.usefixtures("only_local_tasks")
def test_tasks_of_the_example_run(tiny_folder: Path, tmp_path: Path) -> None:
    done = run_command("-m", "examples.python_docs", "-o", tmp_path / "tasks")
    assert done.returncode == 0, done.stderr
    items = [json.loads(line) for line in (tmp_path / "tasks/python_docs.jsonl").read_text().splitlines()]
    assert len(items) > 200 and all(len(set(item["pieces"])) == 4 for item in items)
    assert len({item["answer"] for item in items}) == 4
    model, names = load_model(tiny_folder, CPU, torch.float32), ["python_docs", "python_docs_text"]
    sparsify(model, keep_all_plan(model.config))
    found = run_tasks(model, load_tokenizer(tiny_folder), names, 0.0, 4, tmp_path / "tasks")
    assert 0 <= found["python_docs/acc"] <= 1 < found["python_docs_text/bits_per_byte"]


def test_generated_text_equals_the_harness_own_model(tiny_folder: Path) -> None:
    """exact_match above may be 0 for both: compare the texts themselves."""
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=400)
    options = {"until": ["e", "lob"], "max_gen_toks": 20, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(("The", "Größe", "x **"))]
    ours = harness.HarnessModel(load_model(tiny_folder, CPU, torch.float32), load_tokenizer(tiny_folder), 0.0)
    assert ours.generate_until(requests) == reference.generate_until(requests)


@pytest.mark.usefixtures("only_local_tasks")
def test_sparsity_reaches_the_tasks(tiny_folder: Path, task_folder: Path) -> None:
    model = load_model(tiny_folder, CPU, torch.float32)
    sequences = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(2))
    [plan] = calibrate(model, sequences, Settings((0.6,)), {})
    sparsify(model, plan)
    tokenizer = load_tokenizer(tiny_folder)
    dense, sparse = (run_tasks(model, tokenizer, ["local_text"], s, None, task_folder) for s in (0.0, 1.0))
    assert sparse["local_text/bits_per_byte"] != pytest.approx(dense["local_text/bits_per_byte"], rel=1e-3)
    theirs = hf_results(tiny_folder, task_folder, plan)
    assert sparse["local_text/bits_per_byte"] == pytest.approx(theirs["local_text/bits_per_byte"], rel=1e-3)


@pytest.mark.usefixtures("only_local_tasks")
def test_unknown_task_is_refused(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, CPU, torch.float32)
    with pytest.raises(UserError, match="no_such_task"):
        run_tasks(model, load_tokenizer(tiny_folder), ["no_such_task"], 0.0, None, None)


@pytest.mark.usefixtures("only_local_tasks")
def test_command_line(call: InvokeMain, tiny_folder: Path, task_folder: Path) -> None:  # noqa: F811
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--sparsity", "0", "--tokens", "50")
    tasks = ("--lm-eval", "local_choice", "--lm-eval-path", task_folder, "--lm-eval-limit", "4", "--json")
    code, out, err = call(evaluate_cli.main, *options, *tasks)
    assert code == 0, err
    [row] = json.loads(out.strip().splitlines()[-1])["rows"]
    assert 0 <= row["local_choice/acc"] <= 1


def test_tasks_find_the_package_evaluate_from_a_checkout(tiny_folder: Path, task_folder: Path) -> None:
    """evaluate.py, which lies beside teal/, is not what `import evaluate` gives a task."""
    pytest.importorskip("evaluate")
    text = "import evaluate\n\n\ndef text(document):\n    return f'{evaluate.load.__name__} {document[\"question\"]}'\n"
    (task_folder / "words.py").write_text(text)
    task = (task_folder / "local_choice.yaml").read_text().replace('"{{question}}"', "!function words.text")
    (task_folder / "local_choice.yaml").write_text(task)
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--sparsity", "0", "--tokens", "50")
    tasks = ("--lm-eval", "local_choice", "--lm-eval-path", task_folder, "--lm-eval-limit", "4", "--json")
    done = run_command("-m", "evaluate", *options, *tasks)
    assert done.returncode == 0, done.stderr
    assert "local_choice/acc" in json.loads(done.stdout.strip().splitlines()[-1])["rows"][0]

"""Two tasks for lm-evaluation-harness from Python's own language reference: python -m examples.python_docs -o tasks

No download: the texts are those of help("topics"), which come with Python and so differ by its version. python_docs
asks which of four pieces continues a passage (chance is 25%), python_docs_text for the likelihood of paragraphs.
Calibrate on another text: these topics are also the text that commands calibrate on without one.

    python evaluate.py --sparsity 0.5 --calibration-text book.txt --lm-eval python_docs,python_docs_text \\
        --lm-eval-path tasks
"""

import argparse
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

PASSAGE, PIECE = 32, 10  # words
CHOICES = 4
SEED = 0

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
{body}"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{passage}}"
doc_to_choice: "{{pieces}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
TEXT = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}{{pieces[answer]}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
"""


def paragraphs() -> list[list[str]]:
    """Words of each paragraph of prose that is long enough, in the order of the topics' names."""
    found = (part.split() for name in sorted(topics) for part in topics[name].split("\n\n"))
    prose = [words for words in found if len(words) >= PASSAGE + PIECE and not {"::=", "|"} & set(words)]
    return [list(words) for words in dict.fromkeys(map(tuple, prose))]  # topics share some


def items() -> list[dict[str, object]]:
    """Passages, each with the piece that follows and three that follow others."""
    chance, texts = random.Random(SEED), paragraphs()
    chance.shuffle(texts)
    found: list[dict[str, object]] = []
    for i, words in enumerate(texts):
        others = chance.sample([text for j, text in enumerate(texts) if j != i], CHOICES - 1)
        pieces = [" " + " ".join(text[PASSAGE : PASSAGE + PIECE]) for text in (words, *others)]
        answer = chance.randrange(CHOICES)
        pieces[0], pieces[answer] = pieces[answer], pieces[0]
        found.append({"passage": " ".join(words[:PASSAGE]), "pieces": pieces, "answer": answer})
    return found


def main() -> None:
    """Write the items and both tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("tasks"), help="folder for the tasks")
    folder = parser.parse_args().output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "python_docs.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items()), encoding="utf-8")
    for name, body in (("python_docs", CHOICE), ("python_docs_text", TEXT)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, body=body), encoding="utf-8")
    print(folder)


if __name__ == "__main__":
    main()

"""Metrics of each class: counted one by one, and the worst of many shown."""

import pytest
import torch
from rich.console import Console

from kw_lightning.fit.by_class import class_counters, class_metrics, worst
from kw_lightning.fit.report import classes_table


def printed(table: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_classes_are_counted_one_by_one() -> None:
    counters = class_counters(4)
    answers = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 0]), 4).float()
    counters.update(answers[:3], torch.tensor([0, 0, 0]))  # in batches, as evaluation goes
    counters.update(answers[3:], torch.tensor([1, 2]))
    cat, dog, eel, none = class_metrics(counters, ["cat", "[dog]", "eel"])
    assert (cat["images"], cat["recall"], cat["precision"]) == (3, pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (dog["images"], dog["recall"], dog["precision"]) == (1, 1, 0.5)
    assert (eel["images"], eel["recall"], eel["precision"]) == (1, 0, None)  # never named
    assert none == {"name": "3", "images": 0, "recall": None, "precision": None}
    shown = printed(classes_table([cat, dog, eel, none]))
    assert "│ [dog] │" in shown  # no markup
    assert "│ 3     │      0 │       – │         – │" in shown
    assert "worst" not in shown


def test_answers_of_several_labels_have_an_average_precision() -> None:
    counters = class_counters(2, several=True)
    counters.update(torch.tensor([[0.9, 0.2], [0.6, 0.6], [0.1, 0.7]]), torch.tensor([[1, 0], [0, 1], [0, 0]]))
    first, second = class_metrics(counters)
    assert (first["recall"], first["precision"], first["average_precision"]) == (1, 0.5, 1)
    assert (second["recall"], second["precision"], second["average_precision"]) == (1, 0.5, 0.5)
    assert worst([first, second], 1) == [second]
    assert "average precision" in printed(classes_table([first, second]))


def test_of_many_classes_the_worst_ten_are_shown() -> None:
    classes = [
        {"name": f"c{number}", "images": 5, "recall": (37 * number % 100) / 100, "precision": None}
        for number in range(100)
    ]
    classes.append({"name": "empty", "images": 0, "recall": None, "precision": None})
    shown = printed(classes_table(classes))
    assert "worst 10 of 101 classes" in shown
    assert [entry["recall"] for entry in worst(classes, 10)] == [number / 100 for number in range(10)]
    assert all(f"{number}.00%" in shown for number in range(10))
    assert "empty" not in shown

"""Overrides with which the digits train in a second: 3 steps an epoch, 2 epochs."""

QUICK = [
    "vars.stem=16",
    "vars.first=16",
    "vars.second=16",
    "data.train.samples=60",
    "data.eval.samples=40",
    "data.batch_size=20",
    "train.epochs=2",
    "temperature.epochs=1",
    "log.every_n_steps=1",
    "log.report=false",
]

"""Training from a recipe: `fit("digits-resnet")` trains, `evaluate("runs/digits-resnet-1")` measures again."""

from kw_lightning.fit.ending import Result
from kw_lightning.fit.evaluation import Evaluation, evaluate
from kw_lightning.fit.module import Classifier
from kw_lightning.fit.run import fit

__all__ = ["Classifier", "Evaluation", "Result", "evaluate", "fit"]

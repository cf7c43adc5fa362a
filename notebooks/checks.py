"""The exercises of the notebooks check themselves.

An answer is compared with the repository's own function on seeded inputs. What is wrong is said in words.
"""
import inspect
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import losses
import masking
import model as models

CHECKS = {}                                             # name: (how to check, the repository's function)


def exercise(solution):
    """A decorator: the function below it takes an answer, and returns what is wrong with it, or None."""
    def register(how):
        CHECKS[how.__name__] = (how, solution)
        return how
    return register


def check(name, answer):
    """Say whether an answer is right, and where the repository has its own. Never raises."""
    how, solution = CHECKS[name]
    try:
        problem = how(answer)
    except Exception as error:
        problem = f"it raises {type(error).__name__}: {error}"
    lines, first = inspect.getsourcelines(solution)
    place = f"{Path(inspect.getsourcefile(solution)).name}, line {first}"
    print(f"{name}: {problem}" if problem else f"{name}: right. Ours: {place}, {len(lines)} lines")


def unfinished(result):
    """A stub's body is `...`, so it returns None."""
    return "not written yet: replace the dots" if result is None else None


def differs(result, expected):
    """What is wrong with a tensor, or None: its kind, shape, dtype, values."""
    if result is None:
        return unfinished(result)
    if not torch.is_tensor(result):
        return f"it returns a {type(result).__name__}, not a tensor"
    if result.shape != expected.shape:
        return f"its shape is {tuple(result.shape)}, not {tuple(expected.shape)}"
    if not torch.allclose(result.to(expected.dtype), expected, rtol=1e-4, atol=1e-6):
        largest = (result.to(expected.dtype) - expected).abs().max().item()
        return f"its values differ by up to {largest:.3g}"


# ---- 1_method.py


# ---- 2_what_it_learned.py


# ---- 3_is_it_worth_it.py

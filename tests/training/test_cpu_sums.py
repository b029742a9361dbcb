"""jaxlib 0.10.2 computes some sums wrongly on CPU (JAX's issue 39103): those of a product, fused into one call of YNN.

YNN is a library of kernels that XLA calls on CPU. Of 3 summands per sum, the sums from number 32,768 on were wrong; of 5 to 48,
64 and 384, and where the product was a call of its own, all were right. Two recipes have such calls, with 64 summands or more.
"""

import re

import jax
import jaxlib
import numpy as np
import pytest
from conftest import AS_USERS, SMALL_RECIPES, recipe
from ml_collections import ConfigDict

from contrastive_jax.planning import plan
from contrastive_jax.runtime import sharding
from contrastive_jax.training import build

WRONG = "0.10.2"
HAVE_SUCH_CALLS = (("distil", "tokens"), ("mixers", "external"))  # of 16,384 sums of 64 summands or more
KNOWN = pytest.mark.xfail(strict=True, reason="sums of products, of more summands than were ever wrong")


def sums_of_products(program: str) -> list[str]:
    """The computations of a compiled program that one call of YNN makes, and that sum what a product of theirs gives."""
    bodies = dict(re.findall(r"^(%[\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    found = []
    for name in re.findall(r'calls=(%[\w.-]+)[^\n]*"kind":"__ynn_fusion"', program):
        products = set[str]()  # the instructions that are products, or made of one
        for result, operation, operands in re.findall(r"(%[\w.-]+) = \S+ ([\w-]+)\(([^)]*)\)", bodies[name]):
            from_product = products & set(re.findall(r"%[\w.-]+", operands))
            if operation.startswith("reduce") and from_product:
                found.append(name)
            if operation == "dot" or from_product:
                products.add(result)
    return found


def test_the_wrong_sum_of_a_product_is_one_call() -> None:
    rng = np.random.default_rng(0)
    rows, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((40_000, 3), (3, 3)))
    compiled = jax.jit(jax.vmap(lambda row: ((matrix @ row) ** 2).sum())).lower(rows).compile(dict(AS_USERS))
    expected = ((rows.astype(np.float64) @ matrix.T) ** 2).sum(1)
    wrong = np.abs(np.asarray(compiled(rows)) - expected) > 1e-4 * expected.max()
    if jaxlib.__version__ == WRONG:
        assert not wrong[:32_768].any() and wrong[32_768:].mean() > 0.9
        assert sums_of_products(compiled.as_text())
    else:
        assert not wrong.any()


@pytest.mark.slow
@pytest.mark.skipif(jaxlib.__version__ != WRONG, reason="this jaxlib sums correctly")
@pytest.mark.parametrize(
    ("name", "argument"), [pytest.param(*each, marks=[KNOWN] * (each in HAVE_SUCH_CALLS)) for each in SMALL_RECIPES]
)
def test_no_step_of_a_recipe_has_such_a_call(name: str, argument: str) -> None:
    config = recipe(name, *[argument] * bool(argument))
    config.xla_options = (*config.xla_options, *AS_USERS)
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}), jax.devices()[:1])
    run = build.build(config, mesh, plan.DEFAULT_VOCAB_SIZE)
    assert not sums_of_products(run.train_step.lower(run.shapes, build.batch_shapes(config, mesh)).compile().as_text())

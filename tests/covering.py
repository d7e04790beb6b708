"""Few combinations of options in which every two of them meet in every way."""

import itertools

import numpy as np

MODEL = dict(norm=["layernorm", "rmsnorm"], activation=["gelu", "gelu_tanh", "swiglu"],
             position=["learned", "rope"], qk_norm=[False, True], sliding_window=[None, 3],
             parallel=[False, True], n_kv_head=[None, 2, 1], bias=[True, False],
             tie_weights=[True, False], head_dim=[None, 10], qkv_bias=[None, True, False],
             rope_scaling=["none", "linear", "llama3"], nope_interval=[None, 2])


def pairs(row: dict) -> set[frozenset]:
    """The pairs (option, value), (option, value) that meet in a combination."""
    return set(map(frozenset, itertools.combinations(row.items(), 2)))


def covering(options: dict[str, list]) -> list[dict]:
    """Combinations in which every pair of values of two options occurs, found greedily.

    A combination grows option by option, in random order, by the value that meets most others for
    the first time; the best one of twenty is taken.
    """
    todo = set().union(*(pairs({a: x, b: y}) for a, b in itertools.combinations(options, 2)
                         for x in options[a] for y in options[b]))
    rng, rows = np.random.default_rng(0), []

    def grown() -> dict:
        row = {}
        for name in rng.permutation(list(options)):
            values = [options[name][i] for i in rng.permutation(len(options[name]))]
            row[name] = max(values, key=lambda value: sum(
                frozenset([(name, value), other]) in todo for other in row.items()))
        return {name: row[name] for name in options}

    while todo:
        best = max((grown() for _ in range(20)), key=lambda row: len(pairs(row) & todo))
        todo -= pairs(best)
        rows.append(best)
    return rows

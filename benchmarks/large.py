"""How long it takes to know the structure of a language model of 8 billion parameters that is nowhere in memory.

Usage: `PYTHONPATH=. python benchmarks/large.py`, or `make bench`.

The model has the sizes of Llama 3 8B and lives on the meta device. Each measurement is a process of its own; the clock
starts when the model is built. After the analysis half of every unit is chosen, which certifies that structure.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks.common import describe_environment, summarize, write_result
from benchmarks.process import run_apart
from lightning_prune.mutator import ChannelMutator
from lightning_prune.units import SequentialMutableChannelUnit
from tests.examine import measured

SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TOKENS = (1, 16)
LIMITS = {"seconds": 15, "peak_mib": 2048}


def make_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the model and its example input, both on the meta device."""
    import transformers  # type: ignore[import-not-found, unused-ignore]

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        return model, {"input_ids": torch.zeros(TOKENS, dtype=torch.long)}


def analyze_and_halve() -> dict[str, Any]:
    """Return seconds and memory of the analysis, the same after halving, and what was found."""
    model, example = make_llama()
    mutator = ChannelMutator(SequentialMutableChannelUnit, example)  # without values no scores
    analysis = measured(lambda: mutator.prepare_from_supernet(model))
    halving = measured(lambda: mutator.set_choices({"*": 0.5}))
    dense = mutator.cost({unit.name: 1.0 for unit in mutator.units})
    return {
        "analysis": analysis,
        "halving": halving,
        "units": len(mutator.units),
        "parameters": dense.params,
        "macs_left": round(mutator.cost().macs / dense.macs, 4),
        "parameters_left": round(mutator.cost().params / dense.params, 4),
    }


def main() -> None:
    """Measure and write `results/large.json`; an error if a limit is passed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="processes, at least two")
    rounds = parser.parse_args().rounds
    environment = {**describe_environment("transformers"), "threads": 1}
    records = [run_apart(analyze_and_halve, limit_s=600) for _ in range(rounds)]
    results = {key: records[-1][key] for key in ("units", "parameters", "macs_left", "parameters_left")}
    for phase in ("analysis", "halving"):
        for key in ("cpu_s", "wall_s", "peak_mib"):
            results[f"{phase}_{key}"] = summarize([record[phase][key] for record in records])
    for key, value in results.items():
        print(f"{key:20}{value}")
    config = {"model": SIZES, "tokens": list(TOKENS), "device": "meta", "rounds": rounds, "limits": LIMITS}
    write_result("large", config, environment, results)
    passed = {"seconds": results["analysis_cpu_s"]["median"], "peak_mib": results["analysis_peak_mib"]["median"]}
    if any(passed[key] > limit for key, limit in LIMITS.items()):
        raise SystemExit(f"Got {passed}; expected at most {LIMITS}.")


if __name__ == "__main__":
    main()

"""PREDICTION, not measurement: layer skipping for Llama 3 on an H200, from bytes and published acceptance.

    .venv/bin/python scripts/bench/predict.py [--efficiency 0.8] [--overhead 0.08]

Decoding of one sequence is taken to be bound by reading weights: a layer costs its bytes over the share of
the memory's bandwidth that plain decoding reaches. A draft's layers, run one by one, cost ``overhead`` more;
a public measurement of vLLM on an H100 (a draft that skips nothing, 0.89 to 0.94 of plain) says 6 to 11 %.
"""

import argparse

from clasp_vllm.tools.cost_model import Costs, best_ratio, break_even

BANDWIDTH = 4.8e12  # bytes per second, NVIDIA's data sheet of the H200
GB = 1e9
INTERVAL = 8  # rounds between two optimisation passes
# Layers, bytes of a layer and of the head in bfloat16, GPUs that share them.
MODELS = {
    "Llama-3-8B, 1 x H200": (32, 0.4362 * GB, 1.0507 * GB, 1),
    "Llama-3-70B, 2 x H200 (does not fit on one)": (80, 1.7113 * GB, 2.1013 * GB, 2),
}
# CLaSp (arXiv 2505.24196): share of layers skipped, mean accepted length, speed-up, greedy.
PUBLISHED = {
    "Llama-3-8B, 1 x H200": (0.5, (3.7, 6.2), "1.24"),
    "Llama-3-70B, 2 x H200 (does not fit on one)": (0.55, (4.0, 7.2), "1.67"),
}


def costs_of(layers: int, layer: float, head: float, gpus: int, efficiency: float, overhead: float) -> Costs:
    """The costs of a model on GPUs where reading weights is all that counts."""
    speed = BANDWIDTH * efficiency * gpus
    step = (layers * layer + head) / speed
    columns = 1.15  # an optimisation pass: a plain step of few rows, and the states of its columns
    return Costs(
        1, {0: step, 16: 1.03 * step}, layer / speed * (1 + overhead), 0.0, head / speed, 0.0, step * columns
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of the bandwidth reached")
    parser.add_argument("--overhead", type=float, default=0.08, help="of a draft's layers over their bytes")
    args = parser.parse_args()
    print(
        f"Prediction: {BANDWIDTH / 1e12:.1f} TB/s x {args.efficiency:g}, draft layers +{args.overhead:.0%}."
    )
    for name, shape in MODELS.items():
        costs, layers = costs_of(*shape, args.efficiency, args.overhead), shape[0]
        print(f"\n**{name}**: a plain step takes {1000 * costs.step[0]:.2f} ms\n")
        print("Fixed masks:\n")
        print("| layers skipped | acceptance to break even | ratio at 0.7 | at 0.8 | at 0.9 | at 0.95 |")
        print("|---|---|---|---|---|---|")
        for share in (0.25, 0.4, 0.5, 0.6):
            kept = layers - round(share * layers)
            needed = break_even(costs, kept, 16)
            best = [best_ratio(costs, alpha, kept, 16) for alpha in (0.7, 0.8, 0.9, 0.95)]
            cells = ["never" if needed is None else f"{needed:.2f}"]
            cells += [f"{ratio:.2f} (K={length})" for ratio, length in best]
            print(f"| {share:.0%} | {' | '.join(cells)} |")
        share, lengths, reported = PUBLISHED[name]
        kept = layers - round(share * layers)
        # A draft that stops at its first doubtful token takes about as many steps as it advances by tokens,
        # one of them an optimisation pass in every INTERVAL-th round.
        often = 1 / INTERVAL
        ratios = [costs.ratio(tokens, tokens, tokens - often, kept, often) for tokens in lengths]
        print(
            f"\nAt published mean accepted lengths of {lengths[0]} to {lengths[1]} with {share:.0%} skipped: "
            f"{ratios[0]:.2f} to {ratios[1]:.2f} (the paper, on transformers: {reported})."
        )


if __name__ == "__main__":
    main()

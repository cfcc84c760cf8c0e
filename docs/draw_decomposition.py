"""Draws docs/images/decomposition.png: who attends to whom in S-Attn and in D-Attn.

Run from the repository root: python docs/draw_decomposition.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from megatron_dattn.attention import get_preset
from megatron_dattn.attention.layout import ImageSpan, TokenLayout
from megatron_dattn.attention.reference import pair_masks

NUM_VISUAL, NUM_TEXT = 9, 6
COLORS = {"V2V": "#4c72b0", "V2T": "#8c8c8c", "T2V": "#dd8452", "T2T": "#55a868"}


def draw(axes: Axes, preset: str, title: str) -> None:
    """One matrix of query rows against key rows, coloured by kind of pair."""
    layout = TokenLayout(
        text_lengths=(NUM_TEXT,),
        images=(ImageSpan(sample=0, text_offset=0, grid=(3, 3)),),
        visual_budget=NUM_VISUAL,
        text_budget=NUM_TEXT,
    )
    config = get_preset(preset)
    visible, _ = pair_masks(layout, config)
    distances_fade = config.t2v.rotary
    for query, key in visible.nonzero().tolist():
        kind = ("V" if query < NUM_VISUAL else "T") + "2" + ("V" if key < NUM_VISUAL else "T")
        fades = kind == "T2V" and distances_fade
        alpha = 0.95 - 0.055 * (query - key) if fades else 0.85
        axes.add_patch(Rectangle((key, query), 0.92, 0.92, color=COLORS[kind], alpha=alpha, lw=0))
    size = NUM_VISUAL + NUM_TEXT
    axes.set(xlim=(-0.3, size + 0.2), ylim=(size + 0.2, -0.3), aspect="equal", title=title)
    axes.set_xticks([NUM_VISUAL / 2, NUM_VISUAL + NUM_TEXT / 2], ["visual keys", "text keys"])
    axes.set_yticks(
        [NUM_VISUAL / 2, NUM_VISUAL + NUM_TEXT / 2],
        ["visual\nqueries", "text\nqueries"],
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6))
    draw(left, "s_attn", "S-Attn: one causal softmax, O((|V|+|T|)$^2$)")
    draw(right, "dattn", "D-Attn: decomposed, O(|V|)")
    names = {
        "V2V": "V2V: causal  /  diagonal, out = o(v(x))",
        "T2V": "T2V: fades with distance  /  no positions",
        "T2T": "T2T: causal, unchanged",
    }
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in names]
    figure.legend(handles, names.values(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    target = Path(__file__).parent / "images" / "decomposition.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()

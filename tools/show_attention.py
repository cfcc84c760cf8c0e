"""Show where a model looks while it answers: one picture of the image for every answer token.

    python tools/show_attention.py --checkpoint runs/stage3 --image cat.jpg \\
        --question "What is this?" --output attention.png

Over the image, as the model gets it, lies the attention of the text token that predicted the token,
mean over heads and over the chosen layers; bright is the most that this panel has. The title gives
the token and its alpha_V, the share of its attention that went to images; it is missing where a
cross-attention reads them. Patches that do not enter the decoder are as dark as those that nobody
looks at. --token and --layers count from 1; --image may be given several times.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.data.templates import TEMPLATE_NAMES
from megatron_dattn.errors import UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings
from megatron_dattn.runtime.os_errors import explain
from megatron_dattn.runtime.tool import ToolParser, run_tool

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from megatron_dattn.inference import AttentionMaps

MAX_COLUMNS = 6
PANEL_INCHES = 2.4


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run")
    parser.add_argument("--image", type=Path, action="append", required=True, help="image file")
    parser.add_argument("--question", default="", help="what to ask")
    parser.add_argument("--output", type=Path, default=Path("attention.png"), help="picture file")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to average; all by default")
    parser.add_argument("--token", type=int, help="show one answer token; all by default")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument(
        "--template",
        choices=TEMPLATE_NAMES,
        help="conversation template; the run's own by default (plain captions)",
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before a model is loaded. Raises UserError."""
    most = options.max_new_tokens
    if most < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {most}")
    if options.token is not None and not 1 <= options.token <= most:
        raise UserError(
            f"--token {options.token} is no token of an answer with at most {most}; tokens count "
            "from 1, and --max-new-tokens sets the limit"
        )
    check_output(options.output)


def check_output(path: Path) -> None:
    """Raises UserError for a place or a format in which no picture can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        known = ", ".join(sorted(formats))
        raise UserError(f"cannot write the picture '{path}': choose one of the formats {known}")
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder" if path.is_dir() else "has no folder to stand in"
        raise UserError(f"cannot write the picture '{path}': it {reason}; name another --output")


def chosen_tokens(maps: "AttentionMaps", token: int | None) -> list[int]:
    """Places in the answer, from 0. Raises UserError if there is no such token."""
    if token is None:
        return list(range(len(maps.tokens)))
    if not 1 <= token <= len(maps.tokens):
        raise UserError(
            f"--token {token} is not in the answer, which has tokens 1 to {len(maps.tokens)}"
        )
    return [token - 1]


def draw(
    maps: "AttentionMaps",
    images: "Sequence[np.ndarray]",
    *,
    patch_size: int,
    tokens: Sequence[int],
    layers: list[int] | None = None,
) -> "Figure":
    """A panel for every token and image.

    Args:
        images: uint8 [height, width, 3] each, as the model got them.
        patch_size: pixels; what is left of an image beyond its last whole patch was not seen.
        tokens: places in the answer, from 0.
        layers: as for `AttentionMaps.image_maps`.
    """
    from matplotlib.figure import Figure

    panels = [(token, number) for token in tokens for number in range(len(images))]
    columns = min(MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((PANEL_INCHES * columns, (PANEL_INCHES + 0.3) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    for ax, (token, number) in zip(axes, panels, strict=False):
        heat = maps.image_maps(token, layers)[number].numpy()
        draw_panel(ax, images[number], heat, patch_size)
        weight = maps.mean_alpha(token, layers)
        title = f"{maps.tokens[token]!r}" + ("" if weight is None else f"  {weight:.2f}")
        ax.set_title(title, fontsize=9, parse_math=False)
    return figure


def draw_panel(ax: "Axes", image: "np.ndarray", heat: "np.ndarray", patch_size: int) -> None:
    """An image under a grid of patches, which starts at its upper left corner."""
    height, width = image.shape[:2]
    bottom, right = (patch_size * count for count in heat.shape)
    ax.imshow(image, extent=(0, width, height, 0))
    ax.imshow(
        heat,
        extent=(0, right, bottom, 0),
        cmap="inferno",
        alpha=0.6,
        vmin=0.0,
        interpolation="bilinear",
    )
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def show(options: argparse.Namespace) -> int:
    setup_logging(stream=sys.stderr)
    silence_import_warnings()
    # Imported late: --help should not wait for torch and megatron-core.
    from megatron_dattn.inference import Prompt, attention_maps, decode, generate_tokens, load_model
    from megatron_dattn.inference.attention_maps import check_layers
    from megatron_dattn.runtime.distributed import destroy_distributed

    try:
        check(options)
        loaded = load_model(options.checkpoint, template=options.template)
        check_layers(options.layers or [], loaded.config.model.language.num_hidden_layers)
        prompt = Prompt.from_question(loaded, options.question, options.image)
        (answer,) = generate_tokens(loaded, [prompt], max_new_tokens=options.max_new_tokens)
        print(*decode(loaded, [answer]))
        seen = attention_maps(loaded, prompt, answer)
        figure = draw(
            seen,
            prompt.pixels,
            patch_size=loaded.config.model.vision.patch_size,
            tokens=chosen_tokens(seen, options.token),
            layers=options.layers,
        )
        save(figure, options.output)
    finally:
        destroy_distributed()
    print(f"wrote {options.output}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_tool(lambda: show(options))


def save(figure: "Figure", path: Path) -> None:
    """Write the picture. Raises UserError for a place or a format that cannot be written."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"cannot write the picture: {explain(error, path)}") from error
    except ValueError as error:
        raise UserError(f"cannot write the picture '{path}': {error}") from error


if __name__ == "__main__":
    sys.exit(main())

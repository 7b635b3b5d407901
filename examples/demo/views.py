"""What the page shows of an image's codes, as HTML: images side by side, heat maps, cells, scores."""

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from .actions import Look, Reading


# viridis, from the least to the most: a scale that rises in lightness, so that it reads without colours as well
SCALE = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
NAMES = ("A", "B")

Cell = tuple[int, int]


def data_url(image: Image.Image) -> str:
    """The image as a PNG file inside the page itself, every pixel as it is."""
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_tag(image: Image.Image, description: str) -> str:
    return f'<img src="{data_url(image)}" alt="{escape(description)}">'


def download_link(image: Image.Image, seed: int) -> str:
    """The seed, and a link to the image in its own size: what is shown large has squares for pixels."""
    link = f'<a download="seed{seed}.png" href="{data_url(image)}">Download {image.width}×{image.height} PNG</a>'
    return f"<span>Seed {seed}</span> · {link}"


def figure(image: Image.Image, caption: str, ratio: float, markers: str = "") -> str:
    """An image with a caption. `ratio` is its width by its height as it is shown."""
    frame = f'<div class="frame" style="aspect-ratio: {ratio:.4f}">{image_tag(image, caption)}{markers}</div>'
    return f"<figure>{frame}<figcaption>{escape(caption)}</figcaption></figure>"


def side_by_side(images: Sequence[tuple[Image.Image, str]]) -> str:
    """Images with their captions, as many in a row as there is room for."""
    figures = (figure(image, caption, image.width / image.height) for image, caption in images)
    return f'<div class="figures">{"".join(figures)}</div>'


def empty(text: str) -> str:
    """What stands where nothing is to be seen yet."""
    return f'<p class="nothing">{escape(text)}</p>'


def depth_views(images: Sequence[Image.Image]) -> str:
    """Images of the first code of each cell, of the first two, and so on."""
    captions = ["1 code per cell", *(f"{depth} codes per cell" for depth in range(2, len(images) + 1))]
    return side_by_side(list(zip(images, captions)))


def heat_image(values: np.ndarray, most: float) -> Image.Image:
    """Numbers `(height, width)` from 0 to `most` as an image of so many pixels in the colours of `SCALE`."""
    colours = np.array([[int(one[i : i + 2], 16) for i in (1, 3, 5)] for one in SCALE])
    places = np.clip(values / most, 0, 1) * (len(SCALE) - 1)
    channels = [np.interp(places, range(len(SCALE)), colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def heat_maps(look: Look, cells: Sequence[Cell]) -> str:
    """The entropy of each cell for each depth, beside the image; the chosen cells are outlined."""
    rows, columns, depths = look.entropies.shape
    ratio, most = look.image.width / look.image.height, max(float(look.entropies.max()), 1e-6)
    markers = "".join(
        f'<span class="cell cell-{NAMES[i]}" style="left: {100 * column / columns:.3f}%; top: {100 * row / rows:.3f}%;'
        f' width: {100 / columns:.3f}%; height: {100 / rows:.3f}%" title="{NAMES[i]}"></span>'
        for i, (row, column) in enumerate(cells)
    )
    figures = [figure(look.image, "The image", ratio, markers)]
    for depth in range(depths):
        entropies = look.entropies[..., depth]
        caption = f"Depth {depth + 1}: mean {entropies.mean():.2f}"
        figures.append(figure(heat_image(entropies, most), caption, ratio, markers))
    legend = (
        f'<p class="legend"><span>0</span><span class="scale" style="background: linear-gradient(90deg, '
        f'{", ".join(SCALE)})"></span><span>{most:.2f} nats</span></p>'
        f'<p class="hint">Entropy: how unsure the model was of a code before it was drawn. The most that'
        f" {look.vocab_size} codes can have is {np.log(look.vocab_size):.2f} nats.</p>"
    )
    return f'<div class="figures">{"".join(figures)}</div>{legend}'


def cell_card(look: Look, cell: Cell, name: str) -> str:
    """One cell: its pixels, and for each depth its code, the code's probability, and the likeliest codes."""
    row, column = cell
    step_y, step_x = look.stride
    box = (column * step_x, row * step_y, (column + 1) * step_x, (row + 1) * step_y)
    title = f"{name}: row {row + 1}, column {column + 1}"
    lines = []
    for depth in range(look.codes.shape[-1]):
        code, probability = look.codes[row, column, depth], look.probabilities[row, column, depth]
        top = zip(look.top_codes[row, column, depth], look.top_probabilities[row, column, depth])
        likely = "".join(
            f'<li{" class=drawn" if other == code else ""}><i style="width: {100 * share:.1f}%"></i>'
            f"<span>{other}</span><span>{share:.1%}</span></li>"
            for other, share in top
        )
        lines.append(
            f"<tr><th scope=row>{depth + 1}</th><td><b>{code}</b><br>{probability:.1%}</td>"
            f"<td>{look.entropies[row, column, depth]:.2f}</td><td><ul class=likely>{likely}</ul></td></tr>"
        )
    heads = ("Depth", "Drawn", "Entropy", "Likeliest codes")
    header = "".join(f"<th scope=col>{head}</th>" for head in heads)
    pixels = image_tag(look.image.crop(box), f"The pixels of cell {title}")
    return (
        f'<section class="card card-{name}"><h4>{pixels} {title}</h4>'
        f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table></section>"
    )


def inspector(look: Look | None, cells: Sequence[Cell]) -> str:
    """Heat maps, and the cells that were clicked."""
    if look is None:
        return empty("The heat maps appear here with an image.")
    cards = "".join(cell_card(look, cell, name) for cell, name in zip(cells, NAMES))
    if len(cells) < len(NAMES):
        which = "two cells of the image" if not cells else "one more cell of the image"
        cards += empty(f"Click {which} to see the codes and their probabilities.")
    return f'{heat_maps(look, cells)}<div class="cards">{cards}</div>'


def clicked(look: Look, cells: Sequence[Cell], x: float, y: float) -> list[Cell]:
    """The chosen cells after a click at pixel (x, y) of the image: the last two."""
    rows, columns = look.codes.shape[:2]
    cell = (min(max(int(y // look.stride[0]), 0), rows - 1), min(max(int(x // look.stride[1]), 0), columns - 1))
    return [*(one for one in cells if one != cell), cell][-len(NAMES) :]


def score_view(reading: Reading, condition: str) -> str:
    """How probable the model finds an image, in sum and for each depth."""
    scores, cells = reading.scores, reading.look.codes[..., 0].size
    rows = "".join(
        f"<tr><th scope=row>{depth}</th><td>{nats:,.1f}</td><td>{nats / cells:.2f}</td></tr>"
        for depth, nats in enumerate(scores.per_depth[0].tolist(), start=1)
    )
    return (
        f'<div class="score"><p><strong>{scores.total.item():,.1f} nats</strong>,'
        f" {scores.bits_per_pixel.item():.4f} bits per pixel</p>"
        f"<p>Log-probability of the image's codes {escape(condition)}.</p>"
        "<table><thead><tr><th scope=col>Depth</th><th scope=col>Nats, all cells</th>"
        f"<th scope=col>Nats per cell</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def class_view(reading: Reading, names: Sequence[str], most: int = 5) -> str:
    """The most probable classes of an image, with their probabilities."""
    if reading.classes is None:
        return ""
    shares, labels = reading.classes.log_probs[0].exp().topk(min(most, len(names)))
    lines = "".join(
        f'<li><i style="width: {100 * share:.1f}%"></i><span>{escape(names[label])}</span><span>{share:.1%}</span></li>'
        for share, label in zip(shares.tolist(), labels.tolist())
    )
    return f'<h4>Most likely labels</h4><ul class="likely">{lines}</ul>'


def with_hole(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with what is to be filled in grey."""
    return Image.composite(Image.new("RGB", image.size, (128, 128, 128)), image, mask.convert("L"))

"""What a kernel loads before it runs a notebook whose outputs are saved: figures at twice the points of a
screen, which say how wide they are and how small their smallest letters.

Pixels are those of CSS, 96 an inch, so that 9-point letters are 12 pixels high. A page shows a figure at its
own width, or narrower where the column is.
"""
from base64 import b64encode
from io import BytesIO

PER_INCH, POINTS = 96, 72


def letters_drawn(sizes: list):
    "matplotlib's drawing of text, which notes the size of all letters."
    from matplotlib.backends.backend_agg import RendererAgg
    draw = RendererAgg.draw_text
    def noted(self, gc, x, y, s, prop, *args, **kwargs):
        if s.strip(): sizes.append(prop.get_size_in_points())
        return draw(self, gc, x, y, s, prop, *args, **kwargs)
    return noted


def picture(fig, base64=False, **kwargs):
    "A figure as a PNG, and its width, height and smallest letters in CSS pixels."
    from unittest.mock import patch

    from matplotlib.backends.backend_agg import RendererAgg
    from PIL import Image
    if not fig.axes and not fig.lines: return None
    out, sizes = BytesIO(), []
    with patch.object(RendererAgg, "draw_text", letters_drawn(sizes)):
        fig.canvas.print_figure(out, format="png", dpi=2 * PER_INCH, bbox_inches="tight", pad_inches=0.02,
                                facecolor=fig.get_facecolor())
    width, height = Image.open(out).size
    letters = round(min(sizes, default=0) * PER_INCH / POINTS, 1)
    about = {"width": width // 2, "height": height // 2} | (
        {"letters": int(letters) if letters == int(letters) else letters} if sizes else {}
    )
    return b64encode(out.getvalue()).decode() if base64 else out.getvalue(), about


def install() -> None:
    "Have the running kernel show figures so."
    from IPython import get_ipython
    from IPython.core import pylabtools
    pylabtools.retina_figure = picture
    get_ipython().config.InlineBackend.figure_formats = {"retina"}

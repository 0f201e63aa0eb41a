"""A Sphinx extension: formulas become MathML while the site is built, so that a page needs no script and no
font from elsewhere."""
from html import escape

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

log = logging.getLogger(__name__)


def mathml(node, **kwargs) -> str:
    """A formula as MathML; one that cannot be read is a warning that names its page, and stands as it was
    written."""
    try: return tex2mathml(node.astext(), **kwargs)
    except MathError as e:
        log.warning("a formula cannot be read: %s in %s", e, node.astext().strip(), location=node)
        return f"<code>{escape(node.astext())}</code>"


def inline(translator, node) -> None:
    "A formula within a line."
    translator.body.append(mathml(node))
    raise SkipNode


def block(translator, node) -> None:
    "A formula on lines of its own, which scrolls where the page is narrow."
    translator.body.append(f'<div class="formula">{mathml(node, as_block=True)}</div>\n')
    raise SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A Sphinx extension: formulas become MathML while the site is built, so that a page needs no script and no font from elsewhere."""
from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml


def inline(translator, node) -> None:
    "A formula within a line."
    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def block(translator, node) -> None:
    "A formula on lines of its own, which scrolls where the page is narrow."
    translator.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Plots for self-contained HTML pages."""

import io

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"  # stands for the colour of the page's text


def svg(figure: Figure) -> str:
    """A figure as an element of a page; the same figure gives the same text. What is drawn in `INK` has the page's colour."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dsv3"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()[out.getvalue().index("<svg") :].replace(INK, "currentColor")

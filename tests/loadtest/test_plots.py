from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.loadtest.plots import Line, Panel, draw, require_plot, write_plot

floats = st.floats(0, 1e4)


@settings(max_examples=5)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=20), st.text("<&\"'a", min_size=1, max_size=5))
def test_lines_marks_and_names_are_in_the_figure(points, name):
    panel = Panel(name, "tokens", [Line(name, sorted(points)), Line("other", points, steps=True)], 0.0, [(1.0, name)])
    figure = draw(name, "minutes", [panel, panel])
    for axis in figure.axes:
        curves = [line for line in axis.lines if line.get_label() in (name, "other")]
        assert [list(curve.get_xdata()) for curve in curves] == [[x for x, _ in sorted(points)], [x for x, _ in points]]
        assert [text.get_text() for text in axis.texts] == [name]
        assert axis.get_ylabel() == "tokens"
    assert figure.axes[-1].get_xlabel() == "minutes"


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_file_is_what_its_name_says_and_the_same_again(tmp_path, suffix):
    panel = Panel("panel <1>", "tokens", [Line("one", [(0.0, 1.0), (1.0, 2.0)])])
    written = []
    for number in range(2):
        path = tmp_path / f"{number}{suffix}"
        write_plot(path, "a & b", "minutes", [panel])
        written.append(path.read_bytes())
    assert written[0] == written[1]
    if suffix == ".png":
        assert written[0].startswith(b"\x89PNG")
    else:
        assert "a & b" in "".join(ElementTree.fromstring(written[0]).itertext())


@pytest.mark.parametrize(("name", "said"), [("plot.pdf", "SVG or a PNG"), ("nowhere/plot.svg", "no such folder")])
def test_a_plot_that_cannot_be_written_is_refused_before(tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        require_plot(tmp_path / Path(name))

"""The common look of the pages."""

from matplotlib.figure import Figure

from tinymim.stages.pages.look import log_scale


def test_a_short_logarithmic_axis_has_several_labels() -> None:
    for values, wanted in (([0.6, 1.7], {0.7, 1.0, 1.5}), ([0.02, 3.0], {0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0})):
        axes = Figure().subplots()
        axes.plot(values)
        log_scale(axes)
        low, high = axes.get_ylim()
        assert {round(float(tick), 6) for tick in axes.get_yticks() if low <= tick <= high} == wanted

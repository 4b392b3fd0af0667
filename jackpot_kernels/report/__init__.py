"""What a person looks at after a search or a training: plots and one HTML page."""

from jackpot_kernels.report.page import Table, write_page
from jackpot_kernels.report.plots import Figure, plot_methods, search_figures, training_figures
from jackpot_kernels.report.search import write_search_report
from jackpot_kernels.report.training import write_training_report

__all__ = [
    "Figure",
    "Table",
    "plot_methods",
    "search_figures",
    "training_figures",
    "write_page",
    "write_search_report",
    "write_training_report",
]

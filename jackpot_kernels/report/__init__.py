"""What a person looks at after a search: plots and one HTML page."""

from jackpot_kernels.report.page import Table, write_page
from jackpot_kernels.report.plots import Figure, plot_methods, search_figures
from jackpot_kernels.report.search import write_search_report

__all__ = ["Figure", "Table", "plot_methods", "search_figures", "write_page", "write_search_report"]

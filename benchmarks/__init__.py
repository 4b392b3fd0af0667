"""What the package costs, measured: ``python -m benchmarks`` runs everything and writes a report.

``bench_<op>.py`` times one operation; ``bench_search_step.py``, ``bench_training_step.py`` and
``bench_state.py`` measure the step as a whole. Each asserts first that its contenders do the same work.
"""

"""The paper's claims, checked: ``python -m benchmarks.paper table1``, one command a table or figure.

``paper_values`` holds what the paper says, ``scales`` how large a run is, ``experiments`` which runs answer
which table; ``runs`` makes one of them, ``execute`` all that are missing, ``results`` keeps them; ``tables``,
``figures`` and ``pages`` show them beside the paper's values.
"""

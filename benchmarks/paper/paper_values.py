"""What the paper says (arXiv 2104.08700), number for number; those of rival methods are the paper's too."""

from typing import NamedTuple


class Quoted(NamedTuple):
    """One row of a table of the paper."""

    group: str  # network, or pruning rate
    method: str
    cost: str  # epochs of training (T) or searching (S)
    values: tuple[str, ...]  # in the order of the table's columns


class QuotedTable(NamedTuple):
    """One table of the paper."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Quoted, ...]

    def row(self, group: str, method: str, cost: str) -> Quoted:
        """Return the one row of this name."""
        (found,) = (row for row in self.rows if row[:3] == (group, method, cost))
        return found


OURS = "Jackpot (Ours)"
DENSE = "dense"


def _rows(group: str, lines: str) -> tuple[Quoted, ...]:
    """Read lines of "method | cost | value | value ..."."""
    cells = [[cell.strip() for cell in line.split("|")] for line in lines.strip().splitlines()]
    return tuple(Quoted(group, method, cost, tuple(values)) for method, cost, *values in cells)


TABLES = {
    "table1": QuotedTable(
        "Pruning VGGNet-19 and ResNet-32 on CIFAR-10",
        ("90%", "95%"),
        _rows(
            "VGGNet-19",
            """
            dense          | -       | 94.23      | -
            SET            | 160 (T) | 92.46      | 91.73
            Deep-R         | 160 (T) | 90.81      | 89.59
            SNIP           | 160 (T) | 93.65      | 93.43
            GraSP          | 160 (T) | 93.01      | 92.82
            LT             | 160 (T) | 93.66      | 93.30
            OBD            | 160 (T) | 93.74      | 93.58
            Jackpot (Ours) | 10 (S)  | 93.70±0.12 | 93.54±0.17
            Jackpot (Ours) | 30 (S)  | 93.86±0.09 | 93.67±0.12
            """,
        )
        + _rows(
            "ResNet-32",
            """
            dense          | -       | 94.62      | -
            SET            | 160 (T) | 92.30      | 90.76
            Deep-R         | 160 (T) | 91.62      | 89.84
            SNIP           | 160 (T) | 92.59      | 91.01
            GraSP          | 160 (T) | 92.79      | 91.80
            LT             | 160 (T) | 92.61      | 91.37
            OBD            | 160 (T) | 94.17      | 93.29
            Jackpot (Ours) | 10 (S)  | 94.03±0.12 | 92.54±0.11
            Jackpot (Ours) | 30 (S)  | 94.30±0.07 | 93.51±0.07
            """,
        ),
    ),
    "table2": QuotedTable(
        "Pruning VGGNet-19 and ResNet-32 on CIFAR-100",
        ("90%", "95%"),
        _rows(
            "VGGNet-19",
            """
            dense          | -       | 74.16      | -
            SET            | 160 (T) | 72.36      | 69.81
            Deep-R         | 160 (T) | 66.83      | 63.46
            SNIP           | 160 (T) | 72.83      | 71.83
            GraSP          | 160 (T) | 71.07      | 70.1
            LT             | 160 (T) | 72.58      | 70.47
            OBD            | 160 (T) | 73.83      | 71.98
            Jackpot (Ours) | 10 (S)  | 72.41±0.14 | 72.27±0.21
            Jackpot (Ours) | 30 (S)  | 74.63±0.18 | 72.92±0.31
            """,
        )
        + _rows(
            "ResNet-32",
            """
            dense          | -       | 74.64      | -
            SET            | 160 (T) | 69.66      | 67.41
            Deep-R         | 160 (T) | 66.78      | 63.90
            SNIP           | 160 (T) | 69.97      | 64.81
            GraSP          | 160 (T) | 70.12      | 67.05
            LT             | 160 (T) | 69.63      | 66.48
            OBD            | 160 (T) | 71.96      | 68.73
            Jackpot (Ours) | 10 (S)  | 71.48±0.16 | 68.33±0.22
            Jackpot (Ours) | 30 (S)  | 72.68±0.13 | 70.01±0.14
            """,
        ),
    ),
    "table3": QuotedTable(
        "Pruning ResNet-50 on ImageNet",
        ("Top-1 acc.", "Top-5 acc."),
        _rows(
            "80%",
            """
            dense           | -       | 76.15 | 92.95
            SET             | 100 (T) | 72.60 | 91.20
            Deep-R          | 100 (T) | 71.70 | 90.60
            Dynamic Sparse  | 100 (T) | 73.30 | 92.40
            SNIP            | 100 (T) | 69.67 | 89.24
            GraSP           | 150 (T) | 72.06 | 90.82
            RigL            | 100 (T) | 74.60 | -
            Jackpot (Ours)  | 30 (S)  | 75.19 | 92.52
            Jackpot (Ours)  | 60 (S)  | 75.71 | 92.90
            """,
        )
        + _rows(
            "90%",
            """
            dense           | -       | 76.15 | 92.95
            SET             | 100 (T) | 70.40 | 90.10
            Deep-R          | 100 (T) | 70.20 | 90.00
            Dynamic Sparse  | 100 (T) | 71.60 | 90.50
            SNIP            | 100 (T) | 67.21 | 87.19
            GraSP           | 150 (T) | 68.14 | 88.67
            RigL            | 100 (T) | 72.00 | -
            Jackpot (Ours)  | 30 (S)  | 72.61 | 91.09
            Jackpot (Ours)  | 60 (S)  | 73.04 | 91.34
            """,
        ),
    ),
    "table4": QuotedTable(
        "Pruning MobileNet-V1 and EfficientNet-B4 on ImageNet at 80%",
        ("Top-1 acc.", "Top-5 acc."),
        _rows(
            "MobileNet-V1",
            """
            dense          | -       | 71.93 | 90.37
            RigL           | 180 (T) | 65.01 | 86.98
            Jackpot (Ours) | 30 (S)  | 67.21 | 87.83
            Jackpot (Ours) | 60 (S)  | 67.50 | 88.02
            """,
        )
        + _rows(
            "EfficientNet-B4",
            """
            dense          | -       | 82.61 | 96.41
            RigL           | 180 (T) | 75.46 | 92.57
            Jackpot (Ours) | 30 (S)  | 76.26 | 93.14
            Jackpot (Ours) | 60 (S)  | 76.67 | 93.39
            """,
        ),
    ),
    "table5": QuotedTable(
        "Weight searching methods, ResNet-50 on ImageNet at 90%",
        ("Top-1 acc.", "Top-5 acc."),
        _rows(
            "ResNet-50",
            """
            dense            | -      | 76.15 | 92.95
            Zhou et al.      | 30 (S) | 65.41 | 86.11
            Edge-popup       | 30 (S) | 70.20 | 88.91
            SR-popup (Ours)  | 30 (S) | 72.61 | 91.09
            Zhou et al.      | 60 (S) | 68.40 | 88.03
            Edge-popup       | 60 (S) | 70.89 | 90.12
            SR-popup (Ours)  | 60 (S) | 73.04 | 91.34
            """,
        ),
    ),
    "table6": QuotedTable(
        "Search epochs, ResNet-32 on CIFAR-10 at 90%",
        ("Top-1 acc.", "Architecture Overlap"),
        _rows(
            "ResNet-32",
            """
            starting mask  | 0 (S)    | 10.00±0.01 | 100.0
            Jackpot (Ours) | 10 (S)   | 94.03±0.01 | 96.8
            Jackpot (Ours) | 30 (S)   | 94.30±0.08 | 96.1
            Jackpot (Ours) | 60 (S)   | 94.43±0.13 | 95.4
            Jackpot (Ours) | 100 (S)  | 94.41±0.11 | 94.2
            Jackpot (Ours) | 300 (S)  | 94.42±0.11 | 94.3
            Jackpot (Ours) | 1000 (S) | 94.43±0.14 | 94.1
            """,
        ),
    ),
    "table7": QuotedTable(
        "Components of SR-popup, CIFAR-10 at 90%",
        ("w/o M", "w/o S", "SR"),
        _rows("ResNet-32", "Top-1 acc. | 30 (S) | 94.01±0.11 | 93.69±0.07 | 94.30±0.07"),
    ),
    "table8": QuotedTable(
        "Choice of the pairs that swap, CIFAR-10 at 90%",
        ("Inverse", "Random", "Ours"),
        _rows("ResNet-32", "Top-1 acc. | 30 (S) | 93.13±0.12 | 93.84±0.08 | 94.30±0.07"),
    ),
    "table9": QuotedTable(
        "Schedule of the number of swaps, CIFAR-10 at 90%",
        ("Constant", "Inverse", "Ours"),
        _rows("ResNet-32", "Top-1 acc. | 30 (S) | 93.13±0.12 | 93.44±0.08 | 93.51±0.14"),
    ),
}

# Entries that cannot be right as printed: table and column to what is wrong.
SLIPS = {
    ("table9", "Constant"): (
        "repeats Table 8's Inverse, digit for digit; and the paper names q = 1, which is one swap a step, "
        "but calls it edge-popup, which is rate 1: both readings are run"
    ),
    (
        "table9",
        "Ours",
    ): "has the mean of Table 1's row at 95%, although the text says 90%, where Table 1 has 94.30",
}

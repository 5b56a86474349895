"""Results of a validation: a row an image, the metrics of the restored picture beside those of the input."""

import csv
import io
from dataclasses import dataclass, field
from statistics import fmean

INPUT = 'input'  # column prefix of the unrestored picture's values


@dataclass
class ValidationResults:
    """Metrics by image.

    Attributes:
        dataset: the dataset's name.
        restored: a dictionary of metrics for each image's name.
        degraded: the same for the unrestored input; empty where its size is not the result's.
    """

    dataset: str
    restored: dict[str, dict[str, float]] = field(default_factory=dict)
    degraded: dict[str, dict[str, float]] = field(default_factory=dict)

    def mean(self) -> dict[str, float]:
        """Mean over the images, by metric."""
        return _mean(self.restored)

    def mean_input(self) -> dict[str, float]:
        """Mean over the unrestored inputs, by metric; empty where they were not measured."""
        return _mean(self.degraded)

    def rows(self) -> list[list[str]]:
        """Header, a row an image, and the mean; each metric before and after restoration."""
        metrics = list(next(iter(self.restored.values()), {}))
        header = ['image']
        for metric in metrics:
            header += [f'{INPUT} {metric}', metric] if self.degraded else [metric]
        lines = [(name, self.degraded.get(name, {}), values) for name, values in self.restored.items()]
        lines.append(('mean', self.mean_input(), self.mean()))
        rows = [header]
        for name, before, after in lines:
            row = [name]
            for metric in metrics:
                row += [f'{before[metric]:.4f}'] if self.degraded else []
                row.append(f'{after[metric]:.4f}')
            rows.append(row)
        return rows

    def to_markdown(self) -> str:
        """The table in Markdown, columns aligned for the eye."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [[rows[0][0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(rows[0][1:], widths[1:], strict=True))]]
        lines.append(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])])
        for row in rows[1:]:
            lines.append([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

    def to_csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator='\n').writerows(self.rows())
        return text.getvalue()


def _mean(by_image: dict[str, dict[str, float]]) -> dict[str, float]:
    metrics = next(iter(by_image.values()), {})
    return {metric: fmean(values[metric] for values in by_image.values()) for metric in metrics}

"""What `benchmark.py net` is to reach with AST-B on two cores, and what the official network takes."""

from __future__ import annotations

from ast_plugin.compare.benchmark_backends import Line

# Against a case's first line: at least so many times faster, at most this share of its memory.
TARGETS = {
    ('256² forward', 'fused'): (1.6, None),
    ('512² forward', 'fused'): (2.5, 0.35),
    ('512² forward', 'fused, bf16'): (5.0, None),
    ('2×128² forward and backward', 'fused'): (1.4, 0.6),
    ('photograph 480×720', 'basicsr infer'): (4.0, None),
}
# The authors' code, AST-B in float32, on two cores with AVX-512 of another machine, whose matrix products ran at this
# rate; measured once for this project.
OFFICIAL_SECONDS = {'256² forward': 2.2, '512² forward': 16.0, '2×128² forward and backward': 4.1}
OFFICIAL_RATE = 193e9


def reached(lines: list[Line]) -> list[str]:
    """For each row that has a target, what it is and whether it was reached."""
    said = []
    for line in lines:
        target = TARGETS.get((line['case'], line['path']))
        if target is None or 'faster' not in line:
            continue
        faster, share = target
        parts, is_reached = [f'{line["faster"]:.2f}× of at least {faster}×'], line['faster'] >= faster
        if share is not None and 'of_memory' in line:
            parts.append(f'{line["of_memory"]:.2f} of the memory of at most {share}')
            is_reached = is_reached and line['of_memory'] <= share
        verdict = 'reached' if is_reached else 'NOT reached'
        said.append(f'{line["case"]}, {line["path"]}: {verdict}: {", ".join(parts)}.')
    return said


def official(lines: list[Line], rate: float) -> list[str]:
    """How long our reference takes, and the official network would at the rate of this run's matrix product."""
    said = []
    for line in lines:
        seconds = OFFICIAL_SECONDS.get(line['case'])
        if seconds is None or line['path'] != 'reference' or 'median' not in line:
            continue
        said.append(
            f'{line["case"]}: the reference takes {line["median"]:.2f} s, the official network '
            f'{seconds * OFFICIAL_RATE / rate:.2f} s ({seconds} s at {OFFICIAL_RATE / 1e9:.0f} GFLOP/s, scaled).'
        )
    return said

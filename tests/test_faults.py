"""Faults of datasets with options_type, in the wording of the schema."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ast_plugin.faults import faults_of

UNKNOWN = 'unknown key, did you mean '


class Inner(BaseModel):
    model_config = ConfigDict(extra='forbid')

    kind: Literal['rain', 'haze']


class Options(BaseModel):
    model_config = ConfigDict(extra='forbid')

    name: str
    type: str
    phase: str
    scale: int
    gt_size: int | None = Field(None, ge=8)
    degradation: Inner | list[Inner] | None = None

    @model_validator(mode='after')
    def _size(self):
        if self.phase == 'train' and self.gt_size is None:
            raise ValueError('training needs gt_size')
        return self


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'gt_size': 8}, []),
        ({'gt_size': 8, 'degradation': {'kind': 'rain'}}, []),
        ({'gt_sise': 8, 'gt_size': 8}, [f'datasets.train.gt_sise: {UNKNOWN}gt_size?']),
        ({'gt_size': 4}, ['datasets.train.gt_size: expected 8 or more, got 4']),
        ({}, ['datasets.train: training needs gt_size']),
        (
            {'gt_size': 8, 'degradation': {'kind': 'rian'}},
            ["datasets.train.degradation.kind: expected 'rain' or 'haze', got the text 'rian'"],
        ),
    ],
)
def test_described_dataset(options, expected):
    value = {'name': 'a', 'type': 'Described', 'phase': 'train', 'scale': 1, **options}
    try:
        Options.model_validate(value)
        found = []
    except ValueError as error:
        found = [str(fault) for fault in faults_of(error, Options, value, ('datasets', 'train'))]
    assert found == expected

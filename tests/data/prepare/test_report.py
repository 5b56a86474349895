"""The lines that are printed for an option file can be used as they are, whatever the folder is called."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from ast_plugin.data.prepare.preparation import format_options
from ast_plugin.options.sections import FolderName


@pytest.mark.parametrize(
    ('folder', 'name'),
    [
        ('agan', 'agan_train'),
        ('.cache', 'cache_train'),
        ('', 'train'),
        ("it's: #1", "it's: #1_train"),
        ('a\\b', 'a_b_train'),
        (os.fsdecode(b'fog\xff\n'), '_'.join(('fog', 'udcff', 'n', 'train'))),
        ('x' * 250, f'{"x" * 80}_train'),
    ],
)
def test_names_of_datasets(folder, name):
    lines = format_options([('train', Path('/data') / folder / 'train.jsonl' if folder else Path('/train.jsonl'))])
    # A path whose bytes are no text cannot be in YAML.
    readable = '\n'.join(lines).encode('utf-8', 'replace').decode()
    assert TypeAdapter(FolderName).validate_python(yaml.safe_load(readable)['datasets']['train']['name']) == name

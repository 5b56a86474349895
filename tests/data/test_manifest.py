"""Manifests are read as written, and rejected if invalid."""

import json
import os
from pathlib import Path

import pytest

from ast_plugin.data.layouts import Source, list_pairs
from ast_plugin.data.manifest import Entry, Manifest, read_manifest, write_manifest
from ast_plugin.errors import DataError, OptionError

ENTRIES = [
    Entry('a', 'lq/a.png', 'gt/a.png', (32, 48), (100, 90), ('0a' * 16, '0b' * 16)),
    Entry('b c', 'lq/b c.png', 'gt/é.jpg', (48, 32), (101, 91), ('0c' * 16, '0d' * 16)),
    Entry('\udcfe', 'lq/\udcfe.png', 'gt/\udcfe.png', (1, 1), (1, 1), ('0e' * 16, '0f' * 16)),
]


def write(path: Path, root: Path, entries=ENTRIES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    write_manifest(Manifest(path, 'agan', 'train', root, len(entries), ('lq/x.png',)), entries)
    return path


def test_round_trip(tmp_path):
    path = write(tmp_path / 'prepared' / 'train.jsonl', tmp_path / 'data')
    found = read_manifest(path)
    assert list(found.entries()) == ENTRIES
    assert (found.layout, found.phase, found.root, found.num_pairs) == ('agan', 'train', tmp_path / 'data', 3)
    assert found.others == ('lq/x.png',)
    assert [pair.gt for pair in found.pairs()] == [f'{tmp_path}/data/{entry.gt}' for entry in ENTRIES]
    assert json.loads(path.read_text().splitlines()[0])['root'] == '../data'


def test_root_of_a_moved_tree_and_of_links(tmp_path):
    write(tmp_path / 'old/deep/prepared/train.jsonl', tmp_path / 'old/data')
    os.rename(tmp_path / 'old', tmp_path / 'new')
    os.symlink(tmp_path / 'new/deep/prepared', tmp_path / 'link')
    write(tmp_path / 'link/test.jsonl', tmp_path / 'new/data')
    for path in ('new/deep/prepared/train.jsonl', 'link/train.jsonl', 'link/test.jsonl'):
        assert read_manifest(tmp_path / path).root == tmp_path / 'new/data'


def test_as_a_layout(tmp_path):
    path = write(tmp_path / 'train.jsonl', tmp_path / 'data')
    assert list(list_pairs('manifest', Source(manifest=str(path)))) == list(read_manifest(path).pairs())
    with pytest.raises(DataError, match=r'datasets\.val\.manifest(.|\n)*basicsr data prepare'):
        list_pairs('manifest', Source('val', manifest=str(tmp_path / 'none.jsonl')))
    with pytest.raises(OptionError, match='requires manifest'):
        list_pairs('manifest', Source())


HEADER = {'manifest': 1, 'layout': 'x', 'phase': 'train', 'root': '.', 'pairs': 1, 'others': []}
PAIR = {'key': 'a', 'lq': 'a.png', 'gt': 'b.png', 'size': [1, 1], 'bytes': [1, 1], 'digests': ['aa', 'bb']}


def without(mapping: dict, key: str) -> dict:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ('lines', 'expected'),
    [
        ([], 'line 1 is not a line of a manifest'),
        (['[1]'], 'line 1 is not a line'),
        ([HEADER | {'manifest': 2}], 'a manifest of format 2; expected one of format 1'),
        ([without(HEADER, 'root')], 'lacks root'),
        ([HEADER | {'pairs': 'many'}], 'lacks pairs'),
        ([HEADER | {'others': 3}], '"others" is not a list'),
        ([HEADER | {'others': ['../../photo.png']}], '"others" is not a list of names below root'),
        ([HEADER | {'root': 'long' * 2000}], 'which is not a folder'),
        ([HEADER | {'root': 'nowhere'}], 'nowhere, which is not a folder'),
        ([HEADER], 'expected 1 pairs as stated in the first line, got 0'),
        ([HEADER, PAIR, PAIR], 'expected 1 pairs as stated in the first line, got 2'),
        ([HEADER, json.dumps(PAIR)[:40]], 'line 2 is not a line'),
        ([HEADER, without(PAIR, 'gt')], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'size': [1]}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'size': 7}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'bytes': [1.5, True]}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'digests': [1, 2]}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'key': ''}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'lq': '\ud800.png'}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'lq': '../../etc/passwd.png'}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'gt': '/etc/passwd.png'}], 'line 2 is not a pair'),
        ([HEADER, PAIR | {'gt': 'a\0b.png'}], 'line 2 is not a pair'),
        (['[' * 100_000], 'line 1 is not a line'),
        (['\udc89PNG'], 'not a manifest, which is UTF-8 text'),
    ],
)
def test_what_is_no_manifest(tmp_path, lines, expected):
    path = tmp_path / 'train.jsonl'
    text = ''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in lines)
    path.write_bytes(text.encode('utf-8', 'surrogateescape'))
    with pytest.raises(DataError) as caught:
        list(read_manifest(path).entries())
    assert expected in str(caught.value) and str(path) in str(caught.value)

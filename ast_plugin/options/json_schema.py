"""What option files may say, for editors as a JSON schema, and for documentation key by key."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel

from ast_plugin.options.compare_file import ComparedNetwork, CompareSettings, Head
from ast_plugin.options.reading import BASE_KEY, DELETE_KEY, STAGES_KEY
from ast_plugin.options.sections import (
    Logger,
    Metric,
    MixupOptions,
    Optimizer,
    OptionFile,
    Paths,
    ProtocolOptions,
    Train,
    Val,
    dataset_model,
)
from ast_plugin.options.signatures import argument_model
from ast_plugin.options.validation import Registered

_TEXT_OR_LIST = {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}}]}
_COMPARED = 'of a file for `basicsr compare`'
_VARIABLE = {'type': 'string', 'pattern': r'^\$\{', 'description': '${NAME} or ${NAME:default} of the environment'}


def json_schema(registered: Registered) -> dict[str, Any]:
    """The schema of draft 2020-12, with the registered names and the keys of datasets that describe theirs.

    It says less than `validation.check`: a file inherits and has stages, so that no key is missing for sure.
    """
    schema = OptionFile.model_json_schema()
    definitions = schema.pop('$defs')
    definitions['Variable'] = _VARIABLE
    definitions['Network'] = _typed('a network and its arguments', registered.by_kind['arch'])
    definitions['Loss'] = _typed('a loss and its arguments', registered.by_kind['loss'])
    _name_types(definitions['Metric'], registered.by_kind['metric'])
    _name_types(definitions['Dataset'], registered.by_kind['dataset'])
    _name_types(definitions['Scheduler'], {**registered.own_schedulers, **registered.schedulers})
    schema['properties']['model_type']['anyOf'] = [{'enum': sorted(registered.by_kind['model'])}, {}]
    definitions['Dataset']['allOf'] = list(_described_datasets(registered, definitions))
    definitions['Train']['patternProperties'] = {'_opt$': _or_none({'$ref': '#/$defs/Loss'})}
    for name in [name for name in definitions['Train']['properties'] if name.endswith('_opt')]:
        del definitions['Train']['properties'][name]
    definitions['Paths']['patternProperties'] = {
        '^(pretrain_network|param_key)_': _or_none({'type': 'string'}),
        '^strict_load_': {'type': 'boolean'},
    }
    schema['patternProperties'] = {'^network_': {'$ref': '#/$defs/Network'}}
    for section in (schema, *definitions.values()):
        _open_to_variables(section)
    stage = copy.deepcopy({key: schema[key] for key in ('type', 'properties', 'patternProperties')})
    definitions['Stage'] = {**stage, 'additionalProperties': False, 'description': 'what differs in a stage'}
    definitions['Stage']['properties']['name'] = {'type': 'string', 'description': 'of its folder; by itself stage_N'}
    schema['properties'] |= {
        BASE_KEY: {**_TEXT_OR_LIST, 'description': 'files to build on, relative to this one'},
        STAGES_KEY: {'type': 'array', 'minItems': 1, 'items': {'$ref': '#/$defs/Stage'}},
    }
    _add_comparison(schema, definitions)
    schema.pop('required', None)
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        **schema,
        'title': 'Option file of BasicSR with ast_plugin',
        '$defs': definitions,
    }


def _add_comparison(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """The keys that make an option file one for `basicsr compare`."""
    head = Head.model_json_schema()
    parts = {name: part for name, part in head.pop('$defs').items() if name in ('ComparedNetwork', 'CompareSettings')}
    parts['ComparedNetwork']['properties']['network_g'] = {'$ref': '#/$defs/Network'}
    parts['ComparedNetwork']['properties']['train'] = {'$ref': '#/$defs/Train'}
    for part in parts.values():
        _open_to_variables(part)
    definitions |= parts
    schema['properties'] |= {key: {**value, 'description': _COMPARED} for key, value in head['properties'].items()}


def _typed(description: str, names: Any) -> dict[str, Any]:
    section = {'type': 'object', 'description': description, 'properties': {'type': {'type': 'string'}}}
    _name_types(section, names)
    return section


def _name_types(section: dict[str, Any], names: Any) -> None:
    """Offer the registered names; others may be of a plugin that is not installed here."""
    section['properties']['type']['anyOf'] = [{'enum': sorted(names)}, {}]


def _described_datasets(registered: Registered, definitions: dict[str, Any]):
    for name, target in registered.by_kind['dataset'].items():
        options_type = dataset_model(name, target)
        if options_type is None:
            continue
        described = options_type.model_json_schema(ref_template=f'#/$defs/{name}.{{model}}')
        definitions.update({f'{name}.{key}': value for key, value in described.pop('$defs', {}).items()})
        described.pop('required', None)
        definitions[name] = described
        yield {
            'if': {'properties': {'type': {'const': name}}, 'required': ['type']},
            'then': {'$ref': f'#/$defs/{name}'},
        }


def _open_to_variables(section: dict[str, Any]) -> None:
    """Let a section leave out anything, which it may inherit, and take a variable wherever it is not text already."""
    section.pop('required', None)
    if section.get('additionalProperties') is False:
        section['properties'][DELETE_KEY] = {'type': 'boolean', 'description': 'replace what is inherited'}
    for name, value in section.get('properties', {}).items():
        if value.get('type') not in ('string', 'object') and name not in (DELETE_KEY, 'type'):
            note = {key: value.pop(key) for key in ('description', 'default', 'title') if key in value}
            section['properties'][name] = {'anyOf': [value, {'$ref': '#/$defs/Variable'}], **note}


def _or_none(schema: dict[str, Any]) -> dict[str, Any]:
    return {'anyOf': [schema, {'type': 'null'}]}


class OptionKey(NamedTuple):
    """One key of an option file, as documentation shows it; `default` is None where nothing stands in."""

    section: str
    key: str
    type: str
    default: Any
    description: str


def option_keys(registered: Registered) -> Iterator[OptionKey]:
    """Every key of every section, in the order of a file.

    Args:
        registered: tells the types of datasets that describe their keys, and the arguments of AST.
    Yields:
        The section as a dotted place, with the type behind it where that decides: `datasets.* (PairsDataset)`.
    """
    datasets = [(name, dataset_model(name, target)) for name, target in registered.by_kind['dataset'].items()]
    sections: dict[str, type[BaseModel]] = {
        '': OptionFile,
        **{f'datasets.* ({name})': model for name, model in sorted(datasets) if model is not None},
        'network_g (AST)': argument_model(registered.by_kind['arch']['AST']),
        'path': Paths,
        'train': Train,
        'train.optim_g': Optimizer,
        'train.mixing': MixupOptions,
        'val': Val,
        'val.protocol': ProtocolOptions,
        'val.metrics.*': Metric,
        'logger': Logger,
        'networks.*': ComparedNetwork,
        'compare': CompareSettings,
    }
    for section, model in sections.items():
        schema = model.model_json_schema()
        required = schema.get('required', ())
        for key, value in schema['properties'].items():
            kind = _in_words(value, schema.get('$defs', {})) + (', required' if key in required else '')
            yield OptionKey(section, key, kind, value.get('default'), value.get('description', ''))


_KINDS = {
    'integer': 'whole number',
    'number': 'number',
    'boolean': 'true or false',
    'string': 'text',
    'object': 'mapping',
    'null': '',
}
_LIMITS = {
    'minimum': '{:g} or more',
    'exclusiveMinimum': 'more than {:g}',
    'maximum': '{:g} or less',
    'exclusiveMaximum': 'less than {:g}',
}


def _in_words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value may be: `whole number, 1 or more`, `mixup or cutmix`."""
    if '$ref' in schema:
        return _in_words(definitions[schema['$ref'].rpartition('/')[2]], definitions)
    if 'anyOf' in schema or 'oneOf' in schema:
        parts = (_in_words(part, definitions) for part in schema.get('anyOf') or schema['oneOf'])
        return ' or '.join(dict.fromkeys(part for part in parts if part))
    if 'enum' in schema or 'const' in schema:
        return ' or '.join(map(str, schema.get('enum') or [schema['const']]))
    if schema.get('type') == 'array':
        items = _in_words(schema.get('items', {}), definitions)
        return f'list, each item {items}' if items else 'list'
    limits = [text.format(schema[name]) for name, text in _LIMITS.items() if name in schema]
    return ', '.join([_KINDS.get(schema.get('type', ''), 'anything'), *limits])

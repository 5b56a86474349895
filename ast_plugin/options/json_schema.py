"""What option files may say, as a JSON schema for editors."""

from __future__ import annotations

import copy
from typing import Any

from ast_plugin.options.compare_file import Head
from ast_plugin.options.reading import BASE_KEY, DELETE_KEY, STAGES_KEY
from ast_plugin.options.sections import OptionFile, dataset_model
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

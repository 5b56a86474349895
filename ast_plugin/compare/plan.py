"""What a comparison is to do, read off its option file and tried before any folder is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_plugin import options
from ast_plugin.archs.networks import input_channels, network_of
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.devices import find_device
from ast_plugin.errors import OptionError, PluginError
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.models import preflight
from ast_plugin.options import validation
from ast_plugin.options.reading import NETWORKS_KEY, Sources
from ast_plugin.options.runs import expand_network, is_trained, measured_dataset
from ast_plugin.options.sections import CompareSettings, Registered


@dataclass(frozen=True)
class PlannedNetwork:
    """One network of a comparison.

    Attributes:
        name: of its row.
        network_g: type and arguments.
        train: the option file that trains it; None for one that is measured as it is.
        weights, param_key: that it is measured with, or that its training starts from.
        notes: lines for the reader.
    """

    name: str
    network_g: Mapping[str, Any]
    train: Mapping[str, Any] | None = None
    weights: Path | None = None
    param_key: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What tables call its architecture: its type, and the name of one of spandrel's."""
        return ' '.join(filter(None, [self.network_g['type'], self.network_g.get('name')]))


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        name: of the comparison.
        folder: of its results.
        networks: to be compared.
        dataset: options of the set that is measured, prepared for BasicSR.
        protocol: as `val.protocol` says it; None for BasicSR's own.
        metrics: of `val.metrics`; None for those of the protocol.
        settings: the section `compare`, with what it leaves out filled in.
        bit_depth: of images.
    """

    name: str
    folder: Path
    networks: Sequence[PlannedNetwork]
    dataset: Mapping[str, Any]
    protocol: Any
    metrics: Mapping[str, Mapping[str, Any]] | None
    settings: Mapping[str, Any]
    bit_depth: int = 8


def make_plan(name_or_path: str, root: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a compare file and try all that it needs.

    Args:
        name_or_path: of the file.
        root: folder that `comparisons/` is made in.
        overrides: options as `--force_yml` takes them.
    Raises:
        PluginError: naming what is wrong.
    """
    file = options.find(name_or_path)
    opt = options.load(file, overrides)
    if NETWORKS_KEY not in opt:
        raise OptionError(f'{file}: {NETWORKS_KEY}: required, but not there; one network is trained by `basicsr train`')
    registered = preflight.load_registered()
    validation.check(opt, str(file), registered, explain=Sources(file, overrides).explain)
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = 0  # one seed for all networks, and when the command is given again
    val = opt.get('val') or {}
    try:
        protocol = read_protocol(val.get('protocol'))
    except OptionError as error:
        raise OptionError(f'{file}: val.{error}') from error
    if not val.get('metrics') and not protocol.metrics:
        raise OptionError(f'{file}: val.metrics: required, the protocol {protocol.type} has no metrics of its own')
    settings = CompareSettings.model_validate(opt.get('compare') or {}).model_dump()
    settings['device'] = str(find_device(opt.get('device') or settings['device']))
    folder = Path(root).expanduser().resolve() / 'comparisons' / opt['name']
    planner = _Planner(file, opt, folder, registered)
    networks = [planner.plan(number, entry) for number, entry in enumerate(opt['networks'])]
    return Plan(
        opt['name'],
        folder,
        networks,
        planner.dataset,
        val.get('protocol'),
        val.get('metrics') or None,
        settings,
        opt.get('bit_depth') or 8,
    )


class _Planner:
    """Tries, network by network, what the comparison will need."""

    def __init__(self, file: Path, opt: Mapping[str, Any], folder: Path, registered: Registered) -> None:
        self.file, self.opt, self.folder, self.registered = file, opt, folder, registered
        self.dataset: dict[str, Any] = {}
        self._num_samples: int | None = None
        self._samples: dict[bool, dict[str, Any]] = {True: {}, False: {}}  # read once: of training, and of measuring

    def plan(self, number: int, entry: Mapping[str, Any]) -> PlannedNetwork:
        """Try an entry of `networks`.

        Raises:
            PluginError: if it cannot be built, loaded, trained or measured.
        """
        source = f'{self.file}: networks.{number} ({entry["name"]})'
        weights = None if entry.get('weights') is None else Path(entry['weights']).expanduser()
        opt = expand_network(self.opt, entry)
        notes: list[str] = []
        try:
            if 'network_g' not in opt:
                opt['network_g'], notes = network_of(read_checkpoint(weights, entry.get('param_key')))
            for is_train in [True, False] if is_trained(entry) else [False]:
                weights_of = preflight.check(self._prepare(opt, is_train), source, False, self._samples[is_train])
        except PluginError as error:
            message = str(error)
            raise type(error)(message if message.startswith(str(self.file)) else f'{source}: {message}') from error
        if 'network_g' in weights_of:
            notes = [*notes, *weights_of['network_g'].notes]
        train = opt if is_trained(entry) else None
        return PlannedNetwork(entry['name'], opt['network_g'], train, weights, entry.get('param_key'), tuple(notes))

    def _prepare(self, opt: Mapping[str, Any], is_train: bool) -> dict[str, Any]:
        """Options as BasicSR would get them; all networks share the data."""
        prepared = options.prepare(
            opt if is_train else {**opt, 'val': self.opt.get('val') or {}},  # training alone may have no use for it
            root=self.folder,
            is_train=is_train,
            dataset_types=self.registered.by_kind['dataset'],
            length_of=self._count_samples,
            channels_of=input_channels,
        )
        if not is_train:
            key = measured_dataset(opt)
            self.dataset = prepared['datasets'][key]
            prepared['datasets'] = {key: self.dataset}
        return prepared

    def _count_samples(self, dataset: Mapping[str, Any]) -> int:
        if self._num_samples is None:
            self._num_samples = preflight.count_samples(f'{self.file}: datasets.train', dataset)
        return self._num_samples

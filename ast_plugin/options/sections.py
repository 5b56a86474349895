"""The keys of an option file, section by section: BasicSR's, gathered from its pipelines and models, and ours.

Arguments of registered things are open here; `ast_plugin.options.validation` holds them against what is registered.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ast_plugin.errors import did_you_mean
from ast_plugin.options.reading import BASE_KEY, DELETE_KEY, STAGES_KEY

INPUT = 'input'  # the row of the unrestored images in a comparison

_MOST_NAME_BYTES = 100  # file systems take 255, for the names of a run and its stage, a time and endings
# BasicSR registers some of its own under NAME_basicsr, and falls back to that when NAME is not taken.
_FALLBACK_SUFFIX = '_basicsr'
_TEXT_OR_LIST = {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}}]}
_TEXT_OR_NONE = {'anyOf': [{'type': 'string'}, {'type': 'null'}]}
_VARIABLE = {'type': 'string', 'pattern': r'^\$\{', 'description': '${NAME} or ${NAME:default} of the environment'}


@dataclass(frozen=True)
class Registered:
    """Registered classes and functions by kind (`arch`, `dataset`, `loss`, `metric`, `model`) and name."""

    by_kind: Mapping[str, Mapping[str, object]]
    schedulers: Mapping[str, type] = field(default_factory=dict)  # what `train.scheduler.type` names with every model
    own_schedulers: Mapping[str, type] = field(default_factory=dict)  # further ones that this package's models know
    protocols: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names of each protocol's own metrics
    failed_plugins: Sequence[str] = ()  # a line for each plugin that could not be loaded
    find_optimizer: Callable[[str], type] | None = None  # the class that `train.optim_g.type` names, or OptionError

    def get(self, kind: str, name: str) -> object | None:
        """What BasicSR's registry would give for `name`; None when it would raise."""
        registry = self.by_kind[kind]
        return registry.get(name, registry.get(name + _FALLBACK_SUFFIX))

    def missing(self, kind: str, name: str) -> str:
        """Why `name` cannot be had, and what to do."""
        names = [known.removesuffix(_FALLBACK_SUFFIX) for known in self.by_kind[kind]]
        suggestion = did_you_mean(name, names)
        hint = '; '.join(self.failed_plugins) or f'is its plugin installed? `basicsr list {kind}` shows what there is'
        return f'no {kind} is registered as {name}{suggestion} ({hint})'


def whole(value: Any) -> Any:
    """5e3 is a whole number too: BasicSR's users write frequencies so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_room_for_endings(value: str) -> str:
    if len(value.encode()) > _MOST_NAME_BYTES:
        raise ValueError(f'expected a name of at most {_MOST_NAME_BYTES} bytes, got {len(value.encode())}')
    return value


def _not_taken(value: str) -> str:
    if value.casefold() == INPUT:
        raise ValueError(f'{INPUT} is the name of the unrestored images')
    if 'debug' in value.casefold():
        raise ValueError('BasicSR takes a name with `debug` in it for its debug mode, choose another')
    return value


def _not_none(value: str) -> str:
    if value == 'None':
        raise ValueError('expected text, or nothing, which is written ~')
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(whole)]
Count = Annotated[int, Field(ge=1), BeforeValidator(whole)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(whole)]
FolderName = Annotated[
    str, Field(pattern=r'^[^./\\\s\x00-\x1f][^/\\\x00-\x1f]*$'), AfterValidator(_with_room_for_endings)
]
Text = Annotated[str, AfterValidator(_not_none)]
Size = Annotated[list[Count], Field(min_length=2, max_length=2)]


def _optional(description: str, **limits: Any) -> Any:
    """A key that may be left out, or be nothing."""
    return Field(None, description=description, **limits)


def _described_model(
    name: str, base: type[BaseModel], keys: Iterable[str], described: dict[str, tuple[Any, str]]
) -> type[BaseModel]:
    """A model with optional keys out of a table of types and descriptions; `key2` is `key` in a second round."""
    fields: dict[str, Any] = {}
    for key in keys:
        kind, description = described[key.removesuffix('2')]
        fields[key] = (kind | None, _optional(description + (', second round' if key.endswith('2') else '')))
    return create_model(name, __base__=base, **fields)


class Section(BaseModel):
    """A mapping whose keys are all known. Values have the type the file must give them; nothing is converted."""

    model_config = ConfigDict(extra='forbid', strict=True)


class Typed(BaseModel):
    """Options of something registered: its `type`, and arguments that are checked against it."""

    model_config = ConfigDict(extra='allow', strict=True)

    type: str = Field(min_length=1, description='registered name')


class Network(Typed):
    """A network and its arguments."""


class Loss(Typed):
    """A loss and its arguments."""


class Optimizer(Typed):
    """An optimiser of torch.optim and its arguments."""

    lr: Number = Field(ge=0, description='learning rate')


class Scheduler(Typed):
    """A schedule of the learning rate and its arguments."""


class Metric(Typed):
    """A registered metric and its arguments."""

    better: Literal['higher', 'lower'] | None = _optional('which way is better; higher if not given')


class FileBackend(Typed):
    """How BasicSR's datasets read files."""

    type: Literal['disk', 'lmdb', 'memcached'] = Field(description='kind of storage')


class Dataset(Typed):
    """The keys that BasicSR's pipelines and loaders read of every dataset."""

    name: FolderName = Field(description='name in messages, of tables and result folders')
    io_backend: FileBackend | None = _optional('how files are read; disk if not given')
    batch_size_per_gpu: Count | None = _optional('training images a step, on each device')
    num_worker_per_gpu: CountOrZero | None = _optional('reading processes, for each device')
    dataset_enlarge_ratio: Number | None = _optional('makes a small set a longer epoch', gt=0)
    prefetch_mode: Literal['cpu', 'cuda'] | None = _optional(
        'prepare batches ahead: in a thread, or on the GPU, which needs pin_memory'
    )
    num_prefetch_queue: Count | None = _optional('batches that prefetch_mode cpu keeps ready')
    pin_memory: bool | None = _optional('faster copies to a GPU')
    persistent_workers: bool | None = _optional('keep the reading processes from epoch to epoch')
    phase: str | None = _optional('set from the key under datasets')
    scale: Number | None = _optional('set from the top level')


_FLIPS = ('use_hflip', 'use_rot')
_PATCHES = ('gt_size', *_FLIPS)
_COLORS = ('mean', 'std')
_DATASET_KEYS: dict[str, tuple[Any, str]] = {
    'dataroot_gt': (str, 'clean images: a folder, or an LMDB'),
    'dataroot_lq': (str, 'degraded images: a folder, or an LMDB'),
    'dataroot_flow': (str, 'optical flow: a folder, or an LMDB'),
    'meta_info': (str, 'list of the pairs, or of the images'),
    'meta_info_file': (str, 'list of the images, a name a line'),
    'filename_tmpl': (str, "degraded names, '{}x4'; {} is the clean one without its ending"),
    'gt_size': (Count, 'side of the square training patch in pixels'),
    'use_hflip': (bool, 'flip left and right'),
    'use_rot': (bool, 'flip up and down, and turn'),
    'color': (Literal['y'], 'y: the luma channel alone'),
    'mean': (list[Number], 'taken from each channel'),
    'std': (list[Number], 'that each channel is divided by'),
    'num_frame': (Count, 'frames of a sample'),
    'val_partition': (Literal['official', 'REDS4'], 'which sequences are left out of training'),
    'test_mode': (bool, 'take the sequences of validation'),
    'interval_list': (list[Whole], 'distances between frames to choose from'),
    'random_reverse': (bool, 'play sequences backwards at random'),
    'flip_sequence': (bool, 'append each sequence backwards'),
    'cache_data': (bool, 'keep all images in memory'),
    'padding': (str, 'what stands for frames before the first and after the last'),
    'use_duf_downsampling': (bool, 'degrade as DUF does'),
    'blur_kernel_size': (Count, 'side of the largest blur kernel in pixels'),
    'kernel_list': (list[str], 'kinds of blur kernels'),
    'kernel_prob': (list[Number], 'probability of each kind'),
    'blur_sigma': (list[Number], 'width of the blur, least and most'),
    'betag_range': (list[Number], 'shape of generalised Gaussian kernels'),
    'betap_range': (list[Number], 'shape of plateau kernels'),
    'sinc_prob': (Number, 'probability of a sinc filter'),
    'final_sinc_prob': (Number, 'probability of a last sinc filter'),
}
_PAIRS = ('dataroot_gt', 'dataroot_lq', *_PATCHES, *_COLORS, 'filename_tmpl')
_VIDEO = ('dataroot_gt', 'dataroot_lq', 'meta_info_file', 'num_frame')
_REDS = (*_VIDEO, *_PATCHES, 'dataroot_flow', 'val_partition', 'interval_list', 'random_reverse')
_VIMEO = (*_VIDEO, *_PATCHES, 'random_reverse', 'flip_sequence')
_VIDEO_TEST = (*_VIDEO, 'cache_data', 'padding')
_BLUR = ('blur_kernel_size', 'kernel_list', 'kernel_prob', 'blur_sigma', 'betag_range', 'betap_range', 'sinc_prob')
_BASICSR_DATASETS = {
    'PairedImageDataset': (*_PAIRS, 'meta_info_file', 'color'),
    'RealESRGANPairedDataset': (*_PAIRS, 'meta_info'),
    'SingleImageDataset': ('dataroot_lq', 'meta_info_file', 'color', *_COLORS),
    'FFHQDataset': ('dataroot_gt', 'use_hflip', *_COLORS),
    'RealESRGANDataset': (
        *('dataroot_gt', 'meta_info', 'gt_size', *_FLIPS, 'final_sinc_prob'),
        *(name + number for number in ('', '2') for name in _BLUR),
    ),
    'REDSDataset': _REDS,
    'REDSRecurrentDataset': (*_REDS, 'test_mode'),
    'Vimeo90KDataset': _VIMEO,
    'Vimeo90KRecurrentDataset': _VIMEO,
    'VideoTestDataset': _VIDEO_TEST,
    'VideoTestVimeo90KDataset': _VIDEO_TEST,
    'VideoTestDUFDataset': (*_VIDEO_TEST, 'use_duf_downsampling'),
    'VideoRecurrentTestDataset': _VIDEO_TEST,
}


class BasicSRDataset(Dataset):
    """A dataset of BasicSR 1.4.2, whose keys are all known."""

    model_config = ConfigDict(extra='forbid')


BASICSR_DATASETS = {
    name: _described_model(name, BasicSRDataset, keys, _DATASET_KEYS) for name, keys in _BASICSR_DATASETS.items()
}
"""The keys of BasicSR 1.4.2's own datasets, by their registered names."""


def dataset_model(name: str, target: object) -> type[BaseModel] | None:
    """The keys of the dataset registered as `name`: its own `options_type`, or BasicSR's; None if it does not tell."""
    if getattr(target, '__module__', '').partition('.')[0] == 'basicsr':
        return BASICSR_DATASETS.get(name)
    return getattr(target, 'options_type', None)


class MixupOptions(Section):
    """Mixup or CutMix: blends the images of a batch with one another, degraded and clean ones alike."""

    type: Literal['mixup', 'cutmix'] = Field(description='weighted sums of images, or a rectangle out of another')
    alpha: Number = Field(1.2, gt=0, description='shares are drawn from Beta(alpha, alpha)')
    start_epoch: Count = Field(6, description='first epoch that mixes, counted from 1')
    probability: Number = Field(1.0, ge=0, le=1, description='of a batch to be mixed')


class Train(Section):
    """What is trained, how and for how long. Of `total_iter` and `total_epochs` one must be there."""

    total_iter: Count | None = _optional('length of the run in iterations; or total_epochs')
    total_epochs: Count | None = _optional('length of the run in epochs of the training set')
    warmup_iter: Whole | None = _optional('linear warm-up; -1 for none', ge=-1)
    warmup_epochs: CountOrZero | None = _optional('the same in epochs, in the place of warmup_iter')
    precision: Literal['fp32', 'bf16', 'fp16'] | None = _optional('of the arithmetic; fp32 if not given')
    channels_last: bool | None = _optional('lay tensors out as convolutions on CUDA like them')
    compile: bool | str | None = _optional('compile each block; true, or the name of a backend')
    cuda_graph: bool | None = _optional('on CUDA, replay the network as a graph: small networks gain most')
    accumulate: Count | None = _optional('parts that a batch is cut into; their gradients make one step')
    gradient_checkpointing: bool | None = _optional('compute blocks again going back: less memory')
    mixing: MixupOptions | None = _optional('blend the images of a batch: mixup or cutmix')
    on_nonfinite: Literal['stop', 'skip'] | None = _optional(
        'when a loss is NaN or Inf: stop, the default, or skip the step'
    )
    optim_g: Optimizer | None = _optional('optimiser of network_g: type, lr and its arguments')
    optim_d: Optimizer | None = _optional('optimiser of network_d')
    scheduler: Scheduler | None = _optional('schedule of the learning rate: type and its arguments')
    ema_decay: Number | None = _optional('0 for no averaged weights', ge=0, lt=1)
    clip_grad_norm: Number | None = _optional('longer gradients are cut to this length', gt=0)
    pixel_opt: Loss | None = _optional(
        'loss between images: type and its arguments; RestorationModel takes any number of *_opt'
    )
    perceptual_opt: Loss | None = _optional('loss between features of a VGG network')
    gan_opt: Loss | None = _optional('loss of a GAN: type and its arguments')
    ldl_opt: Loss | None = _optional('locally discriminative loss of ESRGAN and Real-ESRGAN')
    feature_matching_opt: Loss | None = _optional('loss between features of network_d, HiFaceGAN')
    net_d_iters: Count | None = _optional('GANs: steps of network_d for each of network_g')
    net_d_init_iters: CountOrZero | None = _optional('GANs: steps of network_d before network_g begins')
    net_d_reg_every: Count | None = _optional('StyleGAN2: steps of network_d between regularisations')
    net_g_reg_every: Count | None = _optional('StyleGAN2: steps of network_g between regularisations')
    mixing_prob: Number | None = _optional('StyleGAN2: probability of two styles in one image', ge=0, le=1)
    r1_reg_weight: Number | None = _optional('StyleGAN2: weight of the gradient penalty of network_d')
    path_reg_weight: Number | None = _optional('StyleGAN2: weight of the path length penalty of network_g')
    path_batch_shrink: Count | None = _optional('StyleGAN2: part of a batch that the path length is measured on')
    fix_flow: CountOrZero | None = _optional('recurrent video: iterations with the flow held')
    flow_lr_mul: Number | None = _optional(
        'recurrent video: learning rate of the flow network as a multiple of the rest'
    )
    lr_flow: Number | None = _optional('recurrent video GAN: learning rate of the flow network')
    dcn_lr_mul: Number | None = _optional('EDVR: learning rate of deformable convolutions as a multiple of the rest')
    tsa_iter: CountOrZero | None = _optional('EDVR: iterations with all but the fusion of frames held')


ProtocolName = Literal['basicsr', 'spad', 'agan', 'densehaze', 'whole', 'tiled']


class ProtocolOptions(Section):
    """How images are restored and measured; what is left out is as the type has it."""

    type: ProtocolName = Field(description='spad, agan, densehaze: as in the papers; whole; tiled: as memory allows')
    square: Count | None = _optional('zeros around the image, up to a square multiple of this')
    tile: Count | Literal['auto'] | None = _optional('side of a tile in pixels; auto: as memory allows')
    overlap: CountOrZero | None = _optional('pixels that tiles share; a quarter of a tile if not given')
    blend: Literal['ramp', 'mean'] | None = _optional('join tiles by smooth ramps, or by plain averages')
    batch: Count | None = _optional('tiles that go through the network together')
    round: bool | None = _optional('round results to 8 bits before they are measured')
    self_ensemble: bool | None = _optional('mean over the eight flips and rotations')


class DuringTraining(Section):
    """What differs in the validations of a training from those of a test."""

    protocol: ProtocolName | ProtocolOptions | None = _optional('how images are restored and measured')
    metrics: dict[str, Metric] | None = _optional("instead of the protocol's, by their printed names")


class Val(Section):
    """Validation during training, and testing."""

    protocol: ProtocolName | ProtocolOptions | None = _optional('how images are restored and measured')
    during_training: DuringTraining | None = _optional('what differs in validations during training')

    val_freq: Count | None = _optional('iterations between validations; or times_per_epoch')
    times_per_epoch: Count | None = _optional('validations in an epoch of the training set')
    save_img: bool | None = _optional('write the restored images')
    suffix: str | None = _optional('of written images; the name of the run if not given')
    pbar: bool | None = _optional('show a progress bar')
    metrics: dict[str, Metric] | None = _optional("instead of the protocol's, by their printed names")
    best_metric: str | None = _optional('the metric that picks the best weights')
    center_frame_only: bool | None = _optional('video: measure the middle frame of each sequence alone')
    flip_seq: bool | None = _optional('recurrent video: sequences hold their frames backwards, too')
    num_val_samples: Count | None = _optional('StyleGAN2: images drawn at a validation')


class Wandb(Section):
    """Weights & Biases, by BasicSR's keys."""

    project: str | None = _optional('name of the project')
    resume_id: str | None = _optional('identifier of the run to go on with')


class Logger(Section):
    """What is written down, and how often."""

    print_freq: Count = Field(description='iterations between reports')
    save_checkpoint_freq: Count | None = _optional('iterations between training states; or save_checkpoint_epochs')
    save_checkpoint_epochs: Count | None = _optional('epochs between training states')
    keep_checkpoints: Count | None = _optional('states that are kept, the newest ones; 3 if not given')
    use_tb_logger: bool | None = _optional('write curves for TensorBoard')
    tb_pictures: CountOrZero | None = _optional(
        'images shown in TensorBoard at validation: input, result and clean one; 4 if not given'
    )
    wandb: Wandb | None = _optional('send what goes to TensorBoard to Weights & Biases, too')


class Paths(Section):
    """Weights to start from; of each network `pretrain_network_g`, `param_key_g` and `strict_load_g`, by its letter."""

    resume_state: Text | None = _optional('a .state file under training_states/')
    ignore_resume_networks: list[str] | None = _optional('networks that keep their own weights when a run is resumed')


class DistParams(BaseModel):
    """Arguments of `torch.distributed.init_process_group` under slurm."""

    model_config = ConfigDict(extra='allow', strict=True)

    backend: Literal['nccl', 'gloo', 'mpi'] | None = _optional(
        'what processes talk by; nccl on GPUs and gloo on CPUs if not given'
    )
    port: Count | None = _optional('of the first node', le=65535)


_REALESRGAN_KEYS: dict[str, tuple[Any, str]] = {
    'queue_size': (Count, 'pairs kept to mix batches from'),
    'gt_size': (Count, 'side of a clean patch in pixels'),
    'high_order_degradation': (bool, 'degrade twice'),
    'gt_usm': (bool, 'sharpen clean images'),
    'l1_gt_usm': (bool, 'sharpen the reference of the pixel loss'),
    'percep_gt_usm': (bool, 'sharpen the reference of the perceptual loss'),
    'gan_gt_usm': (bool, 'sharpen the reference of the GAN loss'),
    'second_blur_prob': (Number, 'probability of the second blur'),
    'gaussian_noise_prob': (Number, 'probability of Gaussian noise, Poisson noise otherwise'),
    'gray_noise_prob': (Number, 'probability of noise without colour'),
    'resize_prob': (list[Number], 'probabilities to enlarge, to shrink, to keep'),
    'resize_range': (list[Number], 'factors of resizing, least and most'),
    'noise_range': (list[Number], 'sigma of Gaussian noise in 255ths, least and most'),
    'poisson_scale_range': (list[Number], 'scale of Poisson noise, least and most'),
    'jpeg_range': (list[Number], 'quality of JPEG compression, least and most'),
}
_SECOND_ROUND = tuple(f'{key}2' for key in list(_REALESRGAN_KEYS)[8:])
# What Real-ESRGAN's models read from the top level.
RealESRGAN = _described_model('RealESRGAN', Section, (*_REALESRGAN_KEYS, *_SECOND_ROUND), _REALESRGAN_KEYS)


class OptionFile(RealESRGAN):
    """The top level; further networks are called by other letters."""

    name: FolderName = Field(description='of the run, and of its folder')
    model_type: str = Field(min_length=1, description='registered model')
    scale: Number | None = _optional('of super-resolution; 1 for restoration', gt=0)
    device: Literal['auto', 'cpu', 'cuda', 'mps'] | None = _optional(
        'what computes; auto takes the first there is of cuda, mps, cpu; if not given, num_gpu tells'
    )
    num_gpu: CountOrZero | Literal['auto'] | None = _optional(
        'GPUs of each process; all if not given; 0 for the CPU, where no device is given'
    )
    bit_depth: Literal[8, 16] | None = _optional(
        'of images, in metrics and written files too; 16 takes images of 16 bits alone; 8 if not given'
    )
    manual_seed: CountOrZero | None = _optional('drawn if not given')
    backend: Literal['auto', 'fused', 'triton', 'reference'] | None = _optional(
        'what computes our blocks; if not given, what AST_BACKEND names, else the fastest that can'
    )
    find_unused_parameters: bool | None = _optional('distributed training of networks that leave some weights unused')
    dist_params: DistParams | None = _optional('arguments of distributed training under slurm')
    datasets: dict[str, Dataset] = Field(description='train, val, test, or val_2 …: type, and the keys of that dataset')
    network_g: Network | None = _optional('network that restores images: type and its arguments')
    network_d: Network | None = _optional('GANs: network that tells them from clean ones')
    path: Paths | None = _optional('weights and states to start from')
    train: Train | None = _optional('losses, optimiser, schedule, length')
    val: Val | None = _optional('validation and metrics')
    logger: Logger | None = _optional('reports and training states')


@functools.cache
def file_model(letters: tuple[str, ...]) -> type[OptionFile]:
    """The top level of a file with networks of these letters (`g` for `network_g`), and what `path` says of each."""
    kinds = {'pretrain_network': Text | None, 'param_key': Text | None, 'strict_load': bool | None}
    paths = {f'{name}_{letter}': (kind, None) for letter in letters or ('g',) for name, kind in kinds.items()}
    networks = {f'network_{letter}': (Network, ...) for letter in letters}
    path = create_model('Paths', __base__=Paths, **paths)
    return create_model('OptionFile', __base__=OptionFile, path=(path | None, None), **networks)


class Stage(BaseModel):
    """What a stage may say besides the keys of an option file."""

    model_config = ConfigDict(extra='allow', strict=True)

    name: FolderName | None = _optional('of its folder; by itself stage_N')


class StagedFile(BaseModel):
    """What an option file of several stages has besides."""

    stages: list[Stage] = Field(min_length=1, description='what differs in each')


class ComparedNetwork(Section):
    """One network of a comparison."""

    name: Annotated[FolderName, AfterValidator(_not_taken)] = Field(
        description='in tables and plots, and of its folder'
    )
    network_g: Network | None = _optional('type and arguments; not needed where the weights tell')
    weights: str | None = _optional('trained weights; with train, what training starts from')
    param_key: str | None = _optional('where the weights lie in a .pth file, such as params_ema')
    train: dict[str, Any] | None = _optional("what differs from the file's train; without weights not needed")


class CompareSettings(Section):
    """How networks are compared."""

    baseline: str | None = _optional('differences are told against this network; the best if not given')
    minutes: Number | None = _optional('of training for each network, instead of total_iter', gt=0)
    weights: Literal['latest', 'best'] = Field('latest', description='which weights of a training are measured')
    sizes: list[Size] = Field([[256, 256]], min_length=1, description='[height, width] for speed, memory and MACs')
    runs: Count = Field(10, description='timed runs at each size')
    threads: Count | None = _optional('of the CPU, for speed; all cores if not given')
    device: str | None = _optional(
        "of what is measured: auto, cpu, cuda, cuda:1 … or mps; the file's device goes before it"
    )
    resamples: Count = Field(10_000, description='of the images, for confidence intervals')
    confidence: Number = Field(0.95, gt=0, lt=1, description='of the intervals')
    pictures: CountOrZero = Field(4, description='that the report shows')


class ComparedFile(BaseModel):
    """What a file for `basicsr compare` has besides the keys of an option file."""

    networks: list[ComparedNetwork] = Field(min_length=1)
    compare: CompareSettings | None = None


def json_schema(registered: Registered) -> dict[str, Any]:
    """What option files may say, as a JSON schema (draft 2020-12) for editors, with the registered names.

    It says less than `validation.check`: a file inherits and has stages, so that no key is missing for sure.
    """
    schema, compared = OptionFile.model_json_schema(), ComparedFile.model_json_schema()
    definitions = {**compared.pop('$defs'), **schema.pop('$defs'), 'Variable': _VARIABLE}
    definitions['ComparedNetwork']['properties']['train'] = {'$ref': '#/$defs/Train'}
    schema['patternProperties'] = {'^network_': {'$ref': '#/$defs/Network'}}
    definitions['Train']['patternProperties'] = {'_opt$': {'anyOf': [{'$ref': '#/$defs/Loss'}, {'type': 'null'}]}}
    paths = {'^(pretrain_network|param_key)_': _TEXT_OR_NONE, '^strict_load_': {'type': 'boolean'}}
    definitions['Paths']['patternProperties'] = paths
    by_kind = registered.by_kind
    types = {
        'Network': by_kind['arch'],
        'Loss': by_kind['loss'],
        'Metric': by_kind['metric'],
        'Dataset': by_kind['dataset'],
        'Scheduler': {*registered.own_schedulers, *registered.schedulers},
    }
    names = [(definitions[section]['properties']['type'], types[section]) for section in types]
    for value, known in [*names, (schema['properties']['model_type'], by_kind['model'])]:
        value['anyOf'] = [{'enum': sorted(known)}, {}]  # others may be of a plugin that is not installed here
    definitions['Dataset']['allOf'] = list(_described_datasets(registered, definitions))
    for section in (schema, *definitions.values()):
        _open_to_variables(section)
    stage = copy.deepcopy({key: schema[key] for key in ('type', 'properties', 'patternProperties')})
    stage['properties'] |= Stage.model_json_schema()['properties']
    definitions['Stage'] = {**stage, 'additionalProperties': False, 'description': 'what differs in a stage'}
    schema['properties'] |= {
        BASE_KEY: {**_TEXT_OR_LIST, 'description': 'files to build on, relative to this one'},
        STAGES_KEY: {'type': 'array', 'minItems': 1, 'items': {'$ref': '#/$defs/Stage'}},
    }
    for key, value in compared['properties'].items():
        schema['properties'][key] = {**value, 'description': 'of a file for `basicsr compare`'}
    about = {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'Option file of BasicSR with ast_plugin',
    }
    return {**schema, **about, '$defs': definitions}


def _described_datasets(registered: Registered, definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a condition for each type of dataset whose keys are known, and add these to the definitions."""
    for name, target in registered.by_kind['dataset'].items():
        model = dataset_model(name, target)
        if model is None:
            continue
        described = model.model_json_schema(ref_template=f'#/$defs/{name}.{{model}}')
        definitions.update({f'{name}.{key}': value for key, value in described.pop('$defs', {}).items()})
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

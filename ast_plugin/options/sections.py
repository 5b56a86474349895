"""Pydantic models of the sections of an option file: the keys of BasicSR's pipelines and models, and the plugin's.

Arguments of registered classes are not restricted here; `ast_plugin.options.validation` checks them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ast_plugin.errors import did_you_mean
from ast_plugin.options.reading import BASE_KEY, DELETE_KEY, STAGES_KEY

INPUT, CLEAN = 'input', 'clean'  # names of the degraded and clean images in a comparison

_MOST_NAME_BYTES = 100  # file systems allow 255, for the names of run and stage, a timestamp and file extensions
# BasicSR registers some classes as NAME_basicsr and falls back to them if NAME is not registered.
_FALLBACK_SUFFIX = '_basicsr'
_TEXT_OR_LIST = {'anyOf': [{'type': 'string'}, {'type': 'array', 'items': {'type': 'string'}}]}
_TEXT_OR_NONE = {'anyOf': [{'type': 'string'}, {'type': 'null'}]}
_VARIABLE = {'type': 'string', 'pattern': r'^\$\{', 'description': 'environment variable, ${NAME} or ${NAME:default}'}


@dataclass(frozen=True)
class Registered:
    """Registered classes and functions by kind (`arch`, `dataset`, `loss`, `metric`, `model`) and name."""

    by_kind: Mapping[str, Mapping[str, object]]
    schedulers: Mapping[str, type]  # values of `train.scheduler.type` for all models
    own_schedulers: Mapping[str, type]  # additional schedulers of the plugin's models
    protocols: Mapping[str, Sequence[str]]  # metric names of each protocol
    failed_plugins: Sequence[str]  # one line for each plugin that failed to load
    find_optimizer: Callable[[str], type]  # class for `train.optim_g.type`, or OptionError

    def get(self, kind: str, name: str) -> object | None:
        """Return what BasicSR's registry returns for `name`, or None if it raises."""
        registry = self.by_kind[kind]
        return registry.get(name, registry.get(name + _FALLBACK_SUFFIX))

    def missing(self, kind: str, name: str) -> str:
        """Return the error message for a name that is not registered."""
        names = [known.removesuffix(_FALLBACK_SUFFIX) for known in self.by_kind[kind]]
        suggestion = did_you_mean(name, names)
        hint = (
            '; '.join(self.failed_plugins)
            or f'is its plugin installed? `basicsr list {kind}` lists the registered names'
        )
        return f'no {kind} is registered as {name}{suggestion} ({hint})'


def to_whole_number(value: Any) -> Any:
    """Convert an integral float such as 5e3, a common notation in BasicSR's option files, to int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _limit_length(value: str) -> str:
    if len(value.encode()) > _MOST_NAME_BYTES:
        raise ValueError(f'expected a name of at most {_MOST_NAME_BYTES} bytes, got {len(value.encode())}')
    return value


def _not_reserved(value: str) -> str:
    if value.casefold() in (INPUT, CLEAN):
        raise ValueError(f'{value} is reserved for the {"clean" if value.casefold() == CLEAN else "degraded"} images')
    if 'debug' in value.casefold():
        raise ValueError('BasicSR enables its debug mode for names that contain `debug`, choose another name')
    return value


def _not_none(value: str) -> str:
    if value == 'None':
        raise ValueError('expected text, or ~ for no value')
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(to_whole_number)]
Count = Annotated[int, Field(ge=1), BeforeValidator(to_whole_number)]
CountOrZero = Annotated[int, Field(ge=0), BeforeValidator(to_whole_number)]
FolderName = Annotated[str, Field(pattern=r'^[^./\\\s\x00-\x1f][^/\\\x00-\x1f]*$'), AfterValidator(_limit_length)]
Text = Annotated[str, AfterValidator(_not_none)]
Size = Annotated[list[Count], Field(min_length=2, max_length=2)]


def _key(description: str, **limits: Any) -> Any:
    """Return a field that may be omitted or null."""
    return Field(None, description=description, **limits)


def _described_model(
    name: str, base: type[BaseModel], keys: Iterable[str], described: dict[str, tuple[Any, str]]
) -> type[BaseModel]:
    """Create a model with optional keys from a table of types and descriptions; `key2` is described as `key`."""
    fields: dict[str, Any] = {}
    for key in keys:
        kind, description = described[key.removesuffix('2')]
        fields[key] = (kind | None, _key(description + (', second degradation' if key.endswith('2') else '')))
    return create_model(name, __base__=base, __doc__=base.__doc__, **fields)


class Section(BaseModel):
    """Section whose keys are all known. Types are strict: values are not converted."""

    model_config = ConfigDict(extra='forbid', strict=True)


class Typed(BaseModel):
    """Options of a registered class or function: `type` and its arguments."""

    model_config = ConfigDict(extra='allow', strict=True)

    type: str = Field(min_length=1, description='registered name')


class Network(Typed):
    """Network type and arguments."""


class Loss(Typed):
    """Loss type and arguments."""


class Optimizer(Typed):
    """Optimiser type and arguments."""

    lr: Number = Field(ge=0, description='learning rate')


class Scheduler(Typed):
    """Learning rate scheduler type and arguments."""


class Metric(Typed):
    """Metric type and arguments."""

    better: Literal['higher', 'lower'] | None = _key('whether higher or lower values are better (default: higher)')


class FileBackend(Typed):
    """File backend of BasicSR's datasets."""

    type: Literal['disk', 'lmdb', 'memcached'] = Field(description='storage backend')


class Dataset(Typed):
    """Keys that BasicSR's pipelines and data loaders read for every dataset."""

    name: FolderName = Field(description='name of the dataset in messages, tables and result folders')
    io_backend: FileBackend | None = _key('file backend (default: disk)')
    batch_size_per_gpu: Count | None = _key('training batch size per device')
    num_worker_per_gpu: CountOrZero | None = _key('data loader workers per device')
    dataset_enlarge_ratio: Number | None = _key('repetitions of the dataset per epoch', gt=0)
    prefetch_mode: Literal['cpu', 'cuda'] | None = _key('prefetch in a CPU thread, or to the GPU (requires pin_memory)')
    num_prefetch_queue: Count | None = _key('number of batches prefetched by prefetch_mode cpu')
    pin_memory: bool | None = _key('use pinned host memory for faster copies to the GPU')
    persistent_workers: bool | None = _key('keep the data loader workers between epochs')
    phase: str | None = _key('set automatically from the key under datasets')
    scale: Number | None = _key('set automatically from the top level')


_FLIPS = ('use_hflip', 'use_rot')
_PATCHES = ('gt_size', *_FLIPS)
_COLORS = ('mean', 'std')
_DATASET_KEYS: dict[str, tuple[Any, str]] = {
    'dataroot_gt': (str, 'folder or LMDB of clean images'),
    'dataroot_lq': (str, 'folder or LMDB of degraded images'),
    'dataroot_flow': (str, 'folder or LMDB of optical flow'),
    'meta_info': (str, 'text file that lists the pairs or images'),
    'meta_info_file': (str, 'text file that lists the images, one name per line'),
    'filename_tmpl': (str, "name template of degraded images, such as '{}x4'; {} is the clean name without extension"),
    'gt_size': (Count, 'side of the square training patches in pixels'),
    'use_hflip': (bool, 'random horizontal flips'),
    'use_rot': (bool, 'random vertical flips and 90° rotations'),
    'color': (Literal['y'], 'y: use only the luma channel'),
    'mean': (list[Number], 'mean subtracted from each channel'),
    'std': (list[Number], 'standard deviation that each channel is divided by'),
    'num_frame': (Count, 'number of frames per sample'),
    'val_partition': (Literal['official', 'REDS4'], 'sequences held out from training'),
    'test_mode': (bool, 'use the validation sequences'),
    'interval_list': (list[Whole], 'frame intervals to sample from'),
    'random_reverse': (bool, 'randomly reverse sequences'),
    'flip_sequence': (bool, 'append the reversed sequence'),
    'cache_data': (bool, 'keep all images in memory'),
    'padding': (str, 'padding mode for frames before the first and after the last'),
    'use_duf_downsampling': (bool, 'use the downsampling of DUF'),
    'blur_kernel_size': (Count, 'largest side of blur kernels in pixels'),
    'kernel_list': (list[str], 'types of blur kernels'),
    'kernel_prob': (list[Number], 'probability of each kernel type'),
    'blur_sigma': (list[Number], 'range of the blur standard deviation'),
    'betag_range': (list[Number], 'range of the shape parameter of generalised Gaussian kernels'),
    'betap_range': (list[Number], 'range of the shape parameter of plateau kernels'),
    'sinc_prob': (Number, 'probability of a sinc filter'),
    'final_sinc_prob': (Number, 'probability of a final sinc filter'),
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
    """Dataset of BasicSR 1.4.2; all keys are known."""

    model_config = ConfigDict(extra='forbid')


BASICSR_DATASETS = {
    name: _described_model(name, BasicSRDataset, keys, _DATASET_KEYS) for name, keys in _BASICSR_DATASETS.items()
}
"""Models of the datasets of BasicSR 1.4.2, by registered name."""


def dataset_model(name: str, target: object) -> type[BaseModel] | None:
    """Return the model of the dataset registered as `name`: its `options_type`, or BasicSR's; None if unknown."""
    if getattr(target, '__module__', '').partition('.')[0] == 'basicsr':
        return BASICSR_DATASETS.get(name)
    return getattr(target, 'options_type', None)


class MixupOptions(Section):
    """Mixup or CutMix within a batch, applied equally to degraded and clean images."""

    type: Literal['mixup', 'cutmix'] = Field(description='weighted sum of two images, or a rectangle of another image')
    alpha: Number = Field(1.2, gt=0, description='mixing weights are sampled from Beta(alpha, alpha)')
    start_epoch: Count = Field(6, description='first epoch with mixing, starting at 1')
    probability: Number = Field(1.0, ge=0, le=1, description='probability of mixing a batch')


class Train(Section):
    """Losses, optimiser, schedule and length of training. Either `total_iter` or `total_epochs` is required."""

    total_iter: Count | None = _key('number of iterations; alternative to total_epochs')
    total_epochs: Count | None = _key('number of epochs of the training set; alternative to total_iter')
    warmup_iter: Whole | None = _key('iterations of linear warm-up; -1 disables it', ge=-1)
    warmup_epochs: CountOrZero | None = _key('epochs of linear warm-up; alternative to warmup_iter')
    precision: Literal['fp32', 'bf16', 'fp16'] | None = _key('autocast; fp16 with loss scaling (default: fp32)')
    channels_last: bool | None = _key('use the channels_last memory format, which is faster for convolutions on CUDA')
    compile: bool | str | None = _key('torch.compile for each block; true, or the name of a backend')
    cuda_graph: bool | None = _key('CUDA only: replay the network as a CUDA graph; mainly useful for small networks')
    accumulate: Count | None = _key('gradient accumulation: number of micro-batches a batch is split into')
    gradient_checkpointing: bool | None = _key('recompute blocks in the backward pass to reduce memory')
    mixing: MixupOptions | None = _key('mix the images of a batch: mixup or cutmix')
    on_nonfinite: Literal['stop', 'skip'] | None = _key(
        'if a loss is not finite: stop, or skip the step (default: stop)'
    )
    optim_g: Optimizer | None = _key('optimiser of network_g: type, lr and arguments')
    optim_d: Optimizer | None = _key('optimiser of network_d: type, lr and arguments')
    scheduler: Scheduler | None = _key('learning rate scheduler: type and arguments')
    ema_decay: Number | None = _key('decay of the exponential moving average of the weights; 0 disables it', ge=0, lt=1)
    clip_grad_norm: Number | None = _key('maximum norm for gradient clipping', gt=0)
    pixel_opt: Loss | None = _key('pixel loss: type and arguments; RestorationModel takes any number of losses *_opt')
    perceptual_opt: Loss | None = _key('perceptual loss on VGG features: type and arguments')
    gan_opt: Loss | None = _key('GAN loss: type and arguments')
    ldl_opt: Loss | None = _key('locally discriminative learning loss, ESRGAN and Real-ESRGAN')
    feature_matching_opt: Loss | None = _key('HiFaceGAN: loss on features of network_d')
    net_d_iters: Count | None = _key('GANs: steps of network_d per step of network_g')
    net_d_init_iters: CountOrZero | None = _key('GANs: initial steps that train only network_d')
    net_d_reg_every: Count | None = _key('StyleGAN2: interval of the regularisation of network_d in steps')
    net_g_reg_every: Count | None = _key('StyleGAN2: interval of the regularisation of network_g in steps')
    mixing_prob: Number | None = _key('StyleGAN2: probability of style mixing', ge=0, le=1)
    r1_reg_weight: Number | None = _key('StyleGAN2: weight of the R1 gradient penalty of network_d')
    path_reg_weight: Number | None = _key('StyleGAN2: weight of the path length penalty of network_g')
    path_batch_shrink: Count | None = _key('StyleGAN2: divisor of the batch size for path length regularisation')
    fix_flow: CountOrZero | None = _key('recurrent video: initial iterations with a frozen flow network')
    flow_lr_mul: Number | None = _key('recurrent video: factor on the learning rate of the flow network')
    lr_flow: Number | None = _key('recurrent video GAN: learning rate of the flow network')
    dcn_lr_mul: Number | None = _key('EDVR: factor on the learning rate of deformable convolutions')
    tsa_iter: CountOrZero | None = _key('EDVR: initial iterations that train only the fusion of frames')


ProtocolName = Literal['basicsr', 'spad', 'agan', 'densehaze', 'whole', 'tiled']


class ProtocolOptions(Section):
    """How images are restored and measured. Omitted keys have the values of the protocol `type`."""

    type: ProtocolName = Field(description='as in papers (spad, agan, densehaze), or whole images (tiled: if they fit)')
    square: Count | None = _key('zero-pad images to a square whose side is a multiple of this')
    tile: Count | Literal['auto'] | None = _key('tile size in pixels; auto: tile only images that do not fit in memory')
    overlap: CountOrZero | None = _key('overlap of adjacent tiles in pixels (default: a quarter of a tile)')
    blend: Literal['ramp', 'mean'] | None = _key('blend overlapping tiles with smooth ramps or by averaging')
    batch: Count | None = _key('number of tiles per batch')
    round: bool | None = _key('round results to 8 bits before measuring')
    self_ensemble: bool | None = _key('average the results of the eight flips and rotations')
    processing_resolution: Count | None = _key('restore a copy of this shorter side, and apply its change to the image')


class DuringTraining(Section):
    """Settings of validation during training that differ from testing."""

    protocol: ProtocolName | ProtocolOptions | None = _key('how images are restored and measured')
    metrics: dict[str, Metric] | None = _key("metrics by printed name (default: the protocol's metrics)")


class Val(Section):
    """Validation during training, and testing."""

    protocol: ProtocolName | ProtocolOptions | None = _key('how images are restored and measured')
    during_training: DuringTraining | None = _key('settings that differ for validation during training')

    val_freq: Count | None = _key('iterations between validations; alternative to times_per_epoch')
    times_per_epoch: Count | None = _key('validations per epoch of the training set; alternative to val_freq')
    save_img: bool | None = _key('save the restored images')
    suffix: str | None = _key('suffix of saved images (default: name of the run)')
    pbar: bool | None = _key('show a progress bar')
    metrics: dict[str, Metric] | None = _key("metrics by printed name (default: the protocol's metrics)")
    best_metric: str | None = _key('name of the metric that selects the best weights')
    center_frame_only: bool | None = _key('video: measure only the centre frame of each sequence')
    flip_seq: bool | None = _key('recurrent video: sequences also contain their frames in reverse order')
    num_val_samples: Count | None = _key('StyleGAN2: number of images generated per validation')


class Wandb(Section):
    """Logging to Weights & Biases."""

    project: str | None = _key('project name')
    resume_id: str | None = _key('ID of the run to resume')


class Logger(Section):
    """Logging and training states."""

    print_freq: Count = Field(description='iterations between log lines')
    save_checkpoint_freq: Count | None = _key('iterations between states; alternative to save_checkpoint_epochs')
    save_checkpoint_epochs: Count | None = _key('epochs between training states; alternative to save_checkpoint_freq')
    keep_checkpoints: Count | None = _key('number of most recent training states and weights to keep (default: 3)')
    use_tb_logger: bool | None = _key('write TensorBoard logs')
    tb_pictures: CountOrZero | None = _key('images in TensorBoard, each as input, result and clean image (default: 4)')
    wandb: Wandb | None = _key('also log to Weights & Biases; requires use_tb_logger')


class Paths(Section):
    """Initial weights: `pretrain_network_g`, `param_key_g` and `strict_load_g`, with the letter of each network."""

    resume_state: Text | None = _key('training state to resume from, a .state file under training_states/')
    ignore_resume_networks: list[str] | None = _key('networks whose weights are not taken from the resumed run')


class DistParams(BaseModel):
    """Arguments of `torch.distributed.init_process_group` with slurm."""

    model_config = ConfigDict(extra='allow', strict=True)

    backend: Literal['nccl', 'gloo', 'mpi'] | None = _key('communication backend (default: nccl on GPUs, gloo on CPUs)')
    port: Count | None = _key('port of the first node', le=65535)


_REALESRGAN_KEYS: dict[str, tuple[Any, str]] = {
    'queue_size': (Count, 'Real-ESRGAN: size of the pool of pairs that batches are sampled from'),
    'gt_size': (Count, 'Real-ESRGAN: side of clean patches in pixels'),
    'high_order_degradation': (bool, 'Real-ESRGAN: apply the degradation twice'),
    'gt_usm': (bool, 'Real-ESRGAN: apply unsharp masking to clean images'),
    'l1_gt_usm': (bool, 'Real-ESRGAN: use sharpened clean images in the pixel loss'),
    'percep_gt_usm': (bool, 'Real-ESRGAN: use sharpened clean images in the perceptual loss'),
    'gan_gt_usm': (bool, 'Real-ESRGAN: use sharpened clean images in the GAN loss'),
    'second_blur_prob': (Number, 'Real-ESRGAN: probability of the second blur'),
    'gaussian_noise_prob': (Number, 'Real-ESRGAN: probability of Gaussian noise; otherwise Poisson noise'),
    'gray_noise_prob': (Number, 'Real-ESRGAN: probability of gray noise'),
    'resize_prob': (list[Number], 'Real-ESRGAN: probabilities of enlarging, shrinking and keeping the size'),
    'resize_range': (list[Number], 'Real-ESRGAN: range of the resize factor'),
    'noise_range': (list[Number], 'Real-ESRGAN: range of the standard deviation of Gaussian noise in levels of 255'),
    'poisson_scale_range': (list[Number], 'Real-ESRGAN: range of the scale of Poisson noise'),
    'jpeg_range': (list[Number], 'Real-ESRGAN: range of the JPEG quality'),
}
_SECOND_DEGRADATION = tuple(f'{key}2' for key in list(_REALESRGAN_KEYS)[8:])


class RunFile(Section):
    """Top level of an option file. Additional networks have other letters, such as `network_d`."""

    name: FolderName = Field(description='name of the run and its folder')
    model_type: str = Field(min_length=1, description='registered model class')
    scale: Number | None = _key('upscaling factor; 1 for restoration', gt=0)
    device: Literal['auto', 'cpu', 'cuda', 'mps'] | None = _key('auto: first of cuda, mps, cpu (default: by num_gpu)')
    num_gpu: CountOrZero | Literal['auto'] | None = _key(
        'GPUs per process; 0: CPU, unless device is set (default: all)'
    )
    bit_depth: Literal[8, 16] | None = _key('of images, metrics and saved files; 16 needs 16-bit images (default: 8)')
    manual_seed: CountOrZero | None = _key('random seed (default: chosen at random)')
    backend: Literal['auto', 'fused', 'triton', 'reference'] | None = _key(
        'implementation of the AST blocks (default: AST_BACKEND if set, otherwise the fastest available)'
    )
    find_unused_parameters: bool | None = _key('required for distributed training if some parameters are not used')
    dist_params: DistParams | None = _key('arguments of distributed training with slurm')
    datasets: dict[str, Dataset] = Field(description='datasets by key (train, val, test, val_2 …): type and arguments')
    network_g: Network | None = _key('restoration network: type and arguments')
    network_d: Network | None = _key('GANs: discriminator')
    path: Paths | None = _key('initial weights and training state')
    train: Train | None = _key('losses, optimiser, schedule and length of training')
    val: Val | None = _key('validation and metrics')
    logger: Logger | None = _key('logging and training states')


# With the keys that Real-ESRGAN's models read from the top level.
OptionFile = _described_model('OptionFile', RunFile, (*_REALESRGAN_KEYS, *_SECOND_DEGRADATION), _REALESRGAN_KEYS)


@functools.cache
def file_model(letters: tuple[str, ...]) -> type[OptionFile]:
    """Return the model of a file with networks of these letters (`g` for `network_g`) and their keys in `path`."""
    kinds = {'pretrain_network': Text | None, 'param_key': Text | None, 'strict_load': bool | None}
    paths = {f'{name}_{letter}': (kind, None) for letter in letters or ('g',) for name, kind in kinds.items()}
    networks = {f'network_{letter}': (Network, ...) for letter in letters}
    path = create_model('Paths', __base__=Paths, **paths)
    return create_model('OptionFile', __base__=OptionFile, path=(path | None, None), **networks)


class Stage(BaseModel):
    """Additional keys of a stage."""

    model_config = ConfigDict(extra='allow', strict=True)

    name: FolderName | None = _key('name of the stage and its folder (default: stage_N)')


class StagedFile(BaseModel):
    """Additional keys of an option file with stages."""

    stages: list[Stage] = Field(min_length=1, description='stages, each with the options that differ')


class ComparedNetwork(Section):
    """Network of a comparison."""

    name: Annotated[FolderName, AfterValidator(_not_reserved)] = Field(description='in tables, plots and folders')
    network_g: Network | None = _key('type and arguments (default: detected from the weights)')
    weights: str | None = _key('trained weights to measure; with train, the initial weights')
    param_key: str | None = _key('key of the weights in a .pth file, such as params_ema')
    train: dict[str, Any] | None = _key('changes to the section train for this network; with weights, enables training')


class CompareSettings(Section):
    """Settings of a comparison."""

    baseline: str | None = _key('network that differences refer to (default: the best)')
    minutes: Number | None = _key('training time per network in minutes; alternative to total_iter', gt=0)
    weights: Literal['latest', 'best'] = Field('latest', description='weights of a training run to measure')
    sizes: list[Size] = Field([[256, 256]], min_length=1, description='[height, width] for latency, memory and MACs')
    runs: Count = Field(10, description='timed forward passes per size')
    threads: Count | None = _key('CPU threads for latency (default: all cores)')
    device: str | None = _key('auto, cpu, cuda, cuda:1 … or mps; device of the file takes precedence')
    resamples: Count = Field(10_000, description='bootstrap resamples for confidence intervals')
    confidence: Number = Field(0.95, gt=0, lt=1, description='confidence level of the intervals')
    pictures: CountOrZero = Field(4, description='number of images in the report')


class ComparedFile(BaseModel):
    """Additional keys of a file for `basicsr compare`."""

    networks: list[ComparedNetwork] = Field(min_length=1)
    compare: CompareSettings | None = None


def json_schema(registered: Registered) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of option files for editors, including the registered names.

    It is less strict than `validation.check`: no key is required, because files inherit keys and have stages.
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
        value['anyOf'] = [{'enum': sorted(known)}, {}]  # other names may be from plugins that are not installed
    definitions['Dataset']['allOf'] = list(_described_datasets(registered, definitions))
    for section in (schema, *definitions.values()):
        _open_to_variables(section)
    stage = copy.deepcopy({key: schema[key] for key in ('type', 'properties', 'patternProperties')})
    stage['properties'] |= Stage.model_json_schema()['properties']
    definitions['Stage'] = {**stage, 'additionalProperties': False, 'description': 'options that differ in a stage'}
    schema['properties'] |= {
        BASE_KEY: {**_TEXT_OR_LIST, 'description': 'option files to inherit from, relative to this file'},
        STAGES_KEY: {'type': 'array', 'minItems': 1, 'items': {'$ref': '#/$defs/Stage'}},
    }
    for key, value in compared['properties'].items():
        schema['properties'][key] = {**value, 'description': 'section of a file for `basicsr compare`'}
    about = {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'Option file of BasicSR with ast_plugin',
    }
    return {**schema, **about, '$defs': definitions}


def _described_datasets(registered: Registered, definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a condition for each dataset type with known keys, and add these keys to the definitions."""
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
    """Make all keys of a section optional, since they may be inherited, and accept variables for non-text values."""
    section.pop('required', None)
    if section.get('additionalProperties') is False:
        section['properties'][DELETE_KEY] = {'type': 'boolean', 'description': 'replace the inherited section'}
    for name, value in section.get('properties', {}).items():
        if value.get('type') not in ('string', 'object') and name not in (DELETE_KEY, 'type'):
            note = {key: value.pop(key) for key in ('description', 'default', 'title') if key in value}
            section['properties'][name] = {'anyOf': [value, {'$ref': '#/$defs/Variable'}], **note}

"""Bad input by table: exit status 2, a clear message on stderr, no traceback, and no file written or executed."""

import io
import os
import shlex
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.cli.main import main

from .. import tiny_run
from ..data.images import noise, write_noise
from ..weights.helpers import TINY, identity, release_tiny

NET = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 1}
BASE = '{type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 8, num_block: 2, upscale: 1}'
RULE = 'with: {type: MLP, mlp_ratio: 2}, op: append, match'
BRIGHT = BASE.replace('upscale', 'img_range: 1e38, upscale')
UNEVEN = '{type: CosineAnnealingRestartLR, periods: [1, 2], restart_weights: [1]}'
EMPTY_LIST = (
    'datasets:train={name: rain, type: PairsDataset, layout: spad, dataroot: ., '
    'gt_size: 8, batch_size_per_gpu: 2, num_worker_per_gpu: 0}'
)
LONG = 300 * 'x'
INFER = 'infer --weights identity.safetensors --device cpu'


class Malicious:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def write_weights(folder):
    """Write sound and broken weights of several networks."""
    network = build_network(NET)
    save_torch(folder / 'w.pt', {'params': network.state_dict()})
    save_torch(folder / 'other.pth', {'params': build_network({**NET, 'num_feat': 12}).state_dict()})
    save_torch(folder / 'strange.pth', {'params': {'strange.weight': torch.zeros(3)}})  # unknown to spandrel, too
    stream = io.BytesIO()
    torch.save({'params': network.state_dict(), 'extra': Malicious()}, stream)
    (folder / 'code.pth').write_bytes(stream.getvalue())
    (folder / 'cut.pth').write_bytes((folder / 'w.pt').read_bytes()[:-500])
    save_weights(folder / 'identity.safetensors', identity().state_dict(), TINY)
    (folder / 'cut.safetensors').write_bytes((folder / 'identity.safetensors').read_bytes()[:1000])


def write_options(folder):
    opt = yaml.safe_load(tiny_run.OPTIONS)
    del opt['network_g'], opt['path']
    opt |= {'model_type': 'RestorationModel', 'networks': [{'name': 'a', 'network_g': NET}]}
    files = {
        'compare': yaml.safe_dump(opt),
        'keyless': tiny_run.OPTIONS.replace('    use_rot: true\n', ''),
        'nameless': 'name: a',
        'misspelt': 'network_g: {type: ATS}',
        'misfit': 'network_g: {type: AST, embed_dim: 8}',
        'list': '- a\n- b\n',
    }
    for name, text in files.items():
        (folder / f'{name}.yml').write_text(text)


def write_images(folder):
    for number, name in enumerate(('0', '1', 'deep/2')):
        write_noise(folder / f'restored/{name}_net.png', number)
        write_noise(folder / f'gt/{name}.png', number + 9)
    for split in ('train', 'test_a'):
        for number in range(2):
            write_noise(folder / f'raindrop/{split}/data/{number}_rain.png', [len(split), number])
            write_noise(folder / f'raindrop/{split}/gt/{number}_clean.png', [9, len(split), number])
    for number in (1, 2, 51):
        write_noise(folder / f'haze/hazy/{number:02d}_hazy.png', number)
        write_noise(folder / f'haze/GT/{number:02d}_GT.png', number + 100)
    photo = folder / 'photo.png'
    Image.fromarray(noise(96, 128, 3)).save(photo)
    (folder / 'cut.png').write_bytes(photo.read_bytes()[:2000])
    (folder / 'bad').mkdir()
    for number in range(4):
        (folder / 'bad' / f'{number}.png').write_bytes(b'not an image')
    np.save(folder / 'small.npy', np.ones((5, 5)))
    np.savez(folder / 'two.npz', a=np.ones((2, 2)), b=np.ones((2, 2)))
    (folder / 'broken.npy').write_bytes(b'\x93NUMPY not quite')


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder with sound and broken files of every kind, and the results of older runs."""
    folder = tmp_path_factory.mktemp('workspace')
    tiny_run.write(folder)
    for write in (write_weights, write_options, write_images):
        write(folder)
    for name in ('empty', 'there/photo.png', 'moved', 'experiments/tiny', 'experiments/resumed/training_states'):
        (folder / name).mkdir(parents=True)
    (folder / 'experiments/tiny/old.log').write_text('old')
    torch.save({'iter': 4}, folder / 'experiments/resumed/training_states/4.state')
    (folder / 'file').write_text('text')
    (folder / 'real_world.txt').write_text('\n')
    assert main(['data', 'prepare', 'densehaze', str(folder / 'haze'), str(folder / 'prepared')]) == 0
    manifest = (folder / 'prepared/train.jsonl').read_text()
    (folder / 'cut.jsonl').write_text(manifest[: manifest.rindex('{')].replace('"../haze"', '"haze"'))
    (folder / 'moved/train.jsonl').write_text(manifest.replace('"../haze"', '"../../haze"'))
    return folder


CASES = {  # beginning of a command: its end, and parts of the message
    '': [
        ('tran', 'unknown command tran, did you mean train?'),
        ('xyz', 'unknown command xyz (available: train'),
        ('--flag', 'unrecognized arguments: --flag'),
        ('data prepar', 'unknown command prepar, did you mean prepare?'),
        ('train', 'the following arguments are required: -opt'),
        ('train -opt x --auto', 'unrecognized arguments: --auto'),
        ('train -opt x --launcher mpi', 'invalid choice'),
        ('test -opt', 'expected one argument'),
        ('check', 'check: expected -opt FILE, or --schema'),
        ('list ach', 'unknown registry ach, did you mean arch?'),
        ('options file', 'file: expected a folder, got a file'),
    ],
    'train -opt': [
        ('list.yml', 'list.yml: expected keys and values'),
        ('keyless.yml', "datasets.train: PairedImageDataset needs the key 'use_rot', which is missing"),
        ('compare.yml', 'compares several networks; run it with `basicsr compare -opt compare.yml`'),
        (f'{LONG}.yml', f'{LONG}.yml: File name too long'),
        ('tiny.yml --root file', 'cannot be created: Not a directory'),
        ('tiny.yml --launcher pytorch', 'start the processes by `torchrun'),
        ('tiny.yml --launcher slurm', 'start the processes by `srun'),
        ('tiny.yml --auto_resume --force_yml name=resumed', 'resumed/training_states/4.state needs … /net_g_4.pth'),
    ],
    'train -opt tiny.yml --force_yml': [
        ('datasets:train:gt_sise=3', 'tiny.yml: datasets.train.gt_sise: unknown key, did you mean gt_size?'),
        ('network_g:type=AST_TT', 'did you mean AST_T? (is its plugin installed?'),
        ("""'name=__import__("os").system("touch ran") or "/"'""", 'a valid folder name'),
        ('datasets:train:dataroot_gt=nowhere', 'train: PairedImageDataset: No such file or directory: nowhere'),
        ('datasets:val:dataroot_gt=~nobody/x', 'datasets.val: PairedImageDataset: No such file or directory'),
        ('datasets:train:dataroot_lq=empty datasets:train:dataroot_gt=empty', 'PairedImageDataset finds no data'),
        ('datasets:train:gt_size=400', 'datasets.train: PairedImageDataset cannot read the sample of data/lq/'),
        ('datasets:train:dataroot_gt=bad', '.png: not a PNG, JPEG, WebP, TIFF or BMP file'),
        (f"'{EMPTY_LIST}'", 'tiny.yml: datasets.train: real_world.txt is empty'),
        ('network_g:act_type=unheard', 'network_g: SRVGGNetCompact cannot be built'),
        ("'network_g={type: AST, depths: [1, 2]}'", 'tiny.yml: network_g: depths must be'),
        ('train:pixel_opt:reduction=most', 'train.pixel_opt: L1Loss cannot be built from these options: ValueError'),
        ("'train:optim_g:betas=[2, 3]'", 'train.optim_g: AdamW cannot be built from these options: ValueError'),
        (f"'train:scheduler={UNEVEN}'", 'train.scheduler: CosineAnnealingRestartLR cannot be built'),
        ("model_type=RestorationModel 'val:protocol={type: agan, tile: 64}'", 'agan: overlap is 80 and tile is 64'),
        ('val:metrics:psnr:crop_border=wide', 'val.metrics.psnr: calculate_psnr cannot measure with these options'),
        ("'val:metrics:x={type: pyiqa, metric: lpips}'", 'val.metrics.x: the package pyiqa is not installed: pip inst'),
        ('path:pretrain_network_g=nothing.pth', 'nothing.pth does not exist'),
        ('path:pretrain_network_g=cut.pth', 'cut.pth … truncated'),
        ('path:pretrain_network_g=other.pth', 'other.pth … the weights do not match'),
        ('path:pretrain_network_g=code.pth', 'code.pth … can run code'),
        ('path:resume_state=nothing.state', 'path.resume_state: no such file: nothing.state'),
        ('path:resume_state=data', 'path.resume_state: expected a .state file, got the folder data'),
        ('train:optim_g:type=SAM', 'train.optim_g.type: the optimiser SAM is not supported'),
        ('model_type=RestorationModel train:accumulate=3', 'train.accumulate: a batch of 2 cannot be split into 3'),
        ('model_type=RestorationModel train:compile=true', 'train.compile needs repeated blocks'),
        ("'logger:wandb={project: rain}'", 'set logger.use_tb_logger to true'),
        ("'logger:wandb={project: rain}' logger:use_tb_logger=true", 'pip install "ast_plugin[wandb]"'),
    ],
    'test -opt': [
        ('list.yml', 'list.yml: expected keys and values'),
        ('tiny.yml', 'train first (`basicsr train -opt tiny.yml`)'),
        ('tiny.yml --weights cut.pth', 'cut.pth … truncated'),
        ('tiny.yml --weights other.pth', 'other.pth … the weights do not match'),
        ('tiny.yml --weights code.pth', 'code.pth … can run code'),
    ],
    'compare -opt compare.yml --force_yml': [
        (f"'networks=[{{name: a, network_g: {NET}, weights: missing.pth}}]'", 'missing.pth does not exist'),
        (f"'networks=[{{name: a, network_g: {NET}, weights: other.pth}}]'", 'the weights do not match'),
        ("'networks=[{name: a, weights: strange.pth}]'", 'strange.pth does not name its network'),
        ('networks:0:network_g:num_feat=-1', 'networks.0 (a): network_g'),
        ('datasets:val:dataroot_lq=gone', 'gone'),
        ('datasets:train:dataroot_gt=gone', 'gone'),
    ],
    'info -opt tiny.yml': [
        ('--force_yml network_g=None', 'network_g'),
        ('--force_yml network_g:num_feat=0', 'network_g'),
        ('--weights none.pth', 'none.pth'),
        ('--size large', '--size large: expected height and width in pixels'),
    ],
    'mix -opt tiny.yml': [
        ('', 'network_g.type: expected Mixed, got SRVGGNetCompact'),
        ('--size 0 9', '--size 0 9: expected sides of 1 or more'),
    ],
    f"mix -opt tiny.yml --force_yml 'network_g={{type: Mixed, base: {BASE}, mix: [{{{RULE}: body.*}}]}}'": [
        ('network_g:base:num_feats=8', 'network_g.base.num_feats: unknown key, did you mean num_feat?'),
        ('network_g:base:type=EDSRR', 'network_g.base.type: no arch is registered as EDSRR, did you'),
        ('network_g:base=EDSR', 'network_g.base: expected a mapping'),
        ('network_g:mix=ASSA', 'network_g.mix: expected a list'),
        ('network_g:nominal_size=many', 'network_g.nominal_size: expected a whole number'),
        ("'network_g:mix:0:match=bodi.*'", 'mix.0.match: no module matches bodi.*; similar names:'),
        ('network_g:mix:0:with:type=FRRN', 'no block is registered as FRRN, did you mean FRFN?'),
        (f"'network_g:mix=[{{{RULE}: body.*}}, {{{RULE}: body.*}}]'", 'mix.1.match: body.0 also matches mix.0'),
        ('network_g:base_weights=nowhere.pth', 'nowhere.pth does not exist'),
        (
            f"'network_g:base={{type: Mixed, base: {BASE}, mix: [{{{RULE}: body.*}}]}}'",
            'Mixed cannot be the base of a Mixed',
        ),
        (f"'network_g:base={BRIGHT}' 'network_g:mix:0:with={{type: SparseAttention, num_heads: 1}}'", 'is not finite'),
    ],
    'export --format torchscript': [
        ('--task rian -o n.pt', 'unknown task rian, did you mean rain'),
        ('--weights rian -o n.pt', 'or a task (rain, raindrop, haze), did you mean rain?'),
        ('--task rain -opt tiny.yml -o n.pt', '-opt and --param-key require --weights FILE'),
        ('--task rain --size 0x4 -o n.pt', '--size 0x4: expected height and width in pixels, such as 480x720, each 1'),
        ('--task rain --size 99999x99999 -o n.pt', 'at most'),
        ('--task rain --size 1000000000x1000000000 -o n.pt', 'at most'),
        ('--task rain -o n.pth', 'n.pth: the extension does not match the format torchscript'),
        ('--task rain -o no/such.pt', 'the folder no does not exist'),
        ('--task rain -o empty', 'it is a folder'),
        ('--weights w.pt -opt tiny.yml -o ./w.pt', 'w.pt is the weights file itself'),
    ],
    'infer': [
        (f'-i {LONG}.png -o out --task rain', f'{LONG}.png: File name too long'),
        ('--tile big', 'expected a tile size in pixels, or auto, got big'),
        ('-i photo.png -o out --weights missing.pth', 'missing.pth'),
        ('-i photo.png -o out --weights cut.safetensors', 'cut.safetensors'),
        ('-i photo.png -o out --weights photo.png', 'photo.png'),
        ('-i photo.png -o out --weights strange.pth', 'strange.pth does not name its network … -opt'),
        ('-i photo.png -o out --weights rian', 'or a task … did you mean rain?'),
    ],
    f'{INFER} -i photo.png -o out': [
        ('--tile 8 --overlap 8', '--overlap is 8 … tile is 8'),
        ('--quality 0', '--quality is 0: expected 1 to 100'),
        ('--processing-resolution -1', '--processing-resolution is -1: expected 0 or more'),
        ('--max-megapixels nan', '--max-megapixels is nan: expected more than 0'),
        ('--suffix ../x', "--suffix is '../x'"),
        ('--device toaster', 'toaster … cpu'),
        ('-opt AST_derian', 'AST_derian: no such option file'),
        ('-opt nameless.yml', 'network_g'),
        ('-opt misspelt.yml', 'ATS … did you mean AST … plugin'),
        ('-opt misfit.yml', 'identity.safetensors … embed_dim'),
    ],
    INFER: [
        ('-i ~nobody_/x.png -o out', '~nobody_/x.png: cannot be read: No such file'),
        ('-i nowhere -o out', 'nowhere: cannot be read: No such file'),
        ('-i empty -o out', 'empty … no images in this folder … .png'),
        ('-i haze -o out', 'haze … no images … --recursive'),
        ('-i file -o out', 'file: not a PNG'),
        ('-i photo.png -o file', 'file … cannot write images'),
        ('-i photo.png -o file/deeper', 'file … cannot write images'),
        ('-i photo.png -o there', 'is a folder'),
    ],
    'web': [
        ('--host 192.0.2.1', 'expected an address of this machine'),
        ('--port 0', '--port is 0: expected 1 to 65535'),
        ('--max-megapixels 0', '--max-megapixels is 0.0: expected more than 0'),
        ('--weights missing.pth --port 7859', 'missing.pth'),
        ('--weights identity.safetensors --port 7859', 'pip install "ast_plugin[web]"'),
    ],
    'measure': [
        ('nowhere gt', 'nowhere: no such file or folder (restored)'),
        ('~nobody_/x.png file', '~nobody_/x.png: no such file'),
        ('restored gt/0.png', 'expected folders or single images, not both'),
        (
            'restored gt',
            'in all folders (restored: 0_net, 1_net, deep/2_net; gt: 0, 1, deep/2): use --restored-template',
        ),
        ('restored gt --restored-template {}_other', 'expected images named {}_other, found none in this folder'),
        ('empty gt', 'empty: expected images, found none in this folder'),
        ('restored gt --like=dB', 'expected a published value'),
        ('restored gt --like=31.2 --crop-border=2', '--like cannot be combined with'),
        ('restored gt --crop-border=-1', '--crop-border is -1: expected 0 or more'),
        ('restored gt --crop-border=90 --restored-template {}_net', 'none of the 3 pairs could be measured'),
        ('restored gt --csv=gt/0.png/x.csv --restored-template {}_net', 'x.csv cannot be written'),
    ],
    'data prepare': [
        ('agn raindrop out', 'unknown layout agn, did you mean agan?'),
        ('agan nowhere out', 'nowhere: no such folder'),
        ('istd raindrop out', 'ISTD was not found in'),
        (
            'folders raindrop/train out --lq data --gt gt',
            'got data, gt, but no image of data has a partner in gt. Give',
        ),
        ('agan raindrop raindrop/out', 'is inside the dataset'),
        ('agan raindrop out --workers 0', '--workers is 0: expected 1 or more'),
        ('agan raindrop out --split val', 'no split val'),
        ('agan raindrop out --lq x --gt y', 'only valid for the layout folders, not for agan'),
        ('folders raindrop out --lq x', '--lq and --gt go together'),
        ('folders raindrop out --lq-template rain', 'a name template contains one {}'),
    ],
    'data check': [
        ('nowhere', 'nowhere: no such manifest or folder'),
        ('haze', 'expected manifests (*.jsonl) or LMDBs, found none'),
        ('photo.png', 'not a manifest, which is UTF-8 text'),
        ('prepared --manifest prepared/train.jsonl', '--manifest is only valid for LMDBs'),
        ('cut.jsonl', 'expected 2 pairs as stated in the first line, got 1'),
        ('moved/train.jsonl', 'which is not a folder'),
    ],
    'data synth': [
        ('-i photo.png -o out', 'expected --task;'),
        ('--task rain', 'expected -i and -o;'),
        ('--task fog -i photo.png -o out', "invalid choice: 'fog' … rain"),
        ('--task rain -i nowhere.png -o out', 'nowhere.png: cannot be read'),
        ('--task rain -i cut.png -o out', 'cut.png'),
        ('--task rain -i none*.png -o out', 'no file matches this pattern'),
        ('--task rain -i photo.png -o photo.png', 'is not a folder'),
        ('--task haze --depth photo.png -i photo.png cut.png -o out', 'one depth map per photo for 2 photos'),
        ('--sheet sheet.jpg -o out', '--sheet cannot be combined with --output'),
        ('--sheet sheet.xyz -i photo.png', 'expected a name that ends in one of'),
    ],
    'data synth -i photo.png -o out --task': [
        ('rain --count 0', '--count is 0: expected 1 or more'),
        ('rain --seed -1', '--seed is -1: expected 0 or more'),
        ('rain --size 100', 'has 128x96 pixels, fewer than a patch'),
        ('rain --set psnr', 'expected KEY=VALUE'),
        ('rain --set psrn=3', 'psrn: no such parameter, did you mean psnr? (available: psnr'),
        ('rain --set type=rain', 'type: no such parameter (available: psnr'),
        ('rain --set psnr=3,1', 'a range is [lowest, highest]'),
        (
            'rain --set psnr=wet --set angle=1,2,3',
            "rain: psnr: expected a number, got the text 'wet'\nrain: angle: expected 2 items or fewer, got the list",
        ),
        (
            'rain --set psnr=nan --set veil=0,Infinity',
            "rain: psnr: expected a finite number, got the text 'nan'\nrain: veil: expected a finite number, got inf",
        ),
        ('haze --set psnr=true', 'haze: psnr: expected a list, got true'),
        ('shadow --set casters=wall,sun', "casters: expected 'wall', … or 'bars', got the text 'sun'"),
        ('snow --set veil=0,2', 'veil: must be within [0, 1]'),
        ('snow --depth photo.png', 'not used by snow'),
        ('haze --depth no.npy', 'no such file or folder'),
        ('haze --depth photo.png', 'an image with colours'),
        ('haze --depth small.npy', 'small.npy: expected depth of the size of the image'),
        ('haze --depth broken.npy', 'cannot be read as an array'),
        ('haze --depth two.npz', 'expected one array, got 2'),
        ('haze --depth empty', 'expected photo.npy'),
    ],
}


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


@pytest.mark.parametrize(
    ('command', 'expected'),
    [(f'{start} {end}', expected) for start, cases in CASES.items() for end, expected in cases],
    ids=[f'{start[:20]} {end}'[:60] for start, cases in CASES.items() for end, _ in cases],
)
def test_bad_input(workspace, monkeypatch, capfd, command, expected):
    from basicsr.utils import logger

    monkeypatch.chdir(workspace)
    release_tiny(monkeypatch, workspace)
    monkeypatch.setattr(logger, 'initialized_logger', {})
    for package in ('gradio', 'pyiqa', 'wandb'):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    for name in ('NO_PROXY', 'no_proxy', 'GRADIO_TEMP_DIR', 'GRADIO_ANALYTICS_ENABLED'):  # set by `basicsr web`
        monkeypatch.setenv(name, '')
    before = tree(workspace)
    capfd.readouterr()
    try:
        status = main(shlex.split(command))
    except SystemExit as stop:
        status = stop.code
    out, err = capfd.readouterr()
    lines = 1 + expected.count('\n')
    assert status == 2
    assert [part for part in expected.split(' … ') if part not in err] == [], err
    assert err.startswith('usage: ') or (err.startswith('basicsr: error: ') and err.count('\n') == lines)
    assert 'Traceback' not in out + err
    assert tree(workspace) == before
    assert logger.initialized_logger == {}

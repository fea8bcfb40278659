"Comparisons of classifiers of images: folders of transformers, state dicts of torchvision; a task without labels; killed and gone on with."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models as zoo
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel
from spectrum_merging.compare import compare
from spectrum_merging.merge import load_model, load_task
from spectrum_merging.parallel import quiet
from spectrum_merging.verify import verify

colours = dict(red=(220, 30, 30), green=(30, 220, 30), blue=(30, 30, 220))
shades = dict(dark=.35, pale=.9)

def picture(colour, shade, rng):
    "A noisy square of one colour"
    x = np.array(colours[colour])*shades[shade]+rng.normal(0, 25, (16, 16, 3))
    return Image.fromarray(x.clip(0, 255).astype('uint8'))

def pictures(n, seed):
    "`(image, colour, shade)`"
    rng = np.random.default_rng(seed)
    found = [(str(rng.choice([*colours])), str(rng.choice([*shades]))) for _ in range(n)]
    return [(picture(c, s, rng), c, s) for c,s in found]

def data_of(d):
    "A folder with a subfolder per colour; a table of shades that names its images"
    for i,(x,c,_) in enumerate(pictures(120, 1)):
        (d/'colours'/c).mkdir(parents=True, exist_ok=True)
        x.save(d/'colours'/c/f'{i}.png')
    rows = []
    (d/'shades'/'files').mkdir(parents=True)
    for i,(x,_,s) in enumerate(pictures(120, 2)):
        x.save(d/'shades'/'files'/f'{i}.png')
        rows.append(dict(shot=f'files/{i}.png', brightness=s))
    pd.DataFrame(rows).to_csv(d/'shades'/'list.csv', index=False)
    return dict(colour=d/'colours', shade=d/'shades'/'list.csv')

def trained(model, x, y, seed, steps=40):
    opt,g = torch.optim.AdamW(model.parameters(), 2e-3),torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        ix = torch.randint(len(y), (32,), generator=g)
        found = model(x[ix])
        loss = torch.nn.functional.cross_entropy(getattr(found, 'logits', found), y[ix])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return model.eval()

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    d = tmp_path_factory.mktemp('images')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('SPECTRUM_CACHE', str(d/'cache'))
        yield d

@pytest.fixture(scope='module')
def data(home): return data_of(home)

@pytest.fixture(scope='module')
def vits(home):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8)
    reader,rows = ViTImageProcessor(size=dict(height=16, width=16)),pictures(300, 3)
    x = reader(images=[o[0] for o in rows], return_tensors='pt')['pixel_values']
    with quiet():
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(home/'vit')
        reader.save_pretrained(home/'vit')
        for i,(t,names,k) in enumerate((('colour', [*colours], 1), ('shade', [*shades], 2))):
            m = ViTForImageClassification.from_pretrained(home/'vit', num_labels=len(names), id2label=dict(enumerate(names)),
                label2id={o: j for j,o in enumerate(names)})
            trained(m, x, torch.tensor([names.index(o[k]) for o in rows]), i).save_pretrained(home/t)
            reader.save_pretrained(home/t)
    return {t: home/t for t in ('colour','shade')},home/'vit'

def test_folders_of_transformers(vits, data, home):
    "Images in subfolders and in a table; the merged folder answers as the best row did"
    said = []
    table = compare(*vits, data, home/'out', budget='20s', say=said.append).set_index('row')
    assert table.colour['experts']>.9 and table.shade['experts']>.7 and 'average' in table.index
    assert any("images are columns" in o or "images are column 'image'" in o for o in said) and any("'brightness' (names" in o for o in said)
    assert verify(home/'out'/'merged', all=True).ok.all()
    assert load_model(home/'out'/'merged', 'shade').config.id2label[1]=='pale'

def test_a_task_without_labels(vits, data, home, tmp_path):
    "Repairs see it, nobody judges it, and the report says so"
    for i,(x,*_) in enumerate(pictures(40, 4)): x.save(tmp_path/f'{i}.png')
    said = []
    table = compare(*vits, data | dict(shade=tmp_path), home/'bare', unlabelled=('shade',), budget='8s', say=said.append)
    assert 'colour' in table and 'shade' not in table
    assert any(o.startswith('shade: ') and 'not judged' in o for o in said)
    with pytest.raises(ValueError, match='no task has labels'):
        compare(*vits, dict(colour=tmp_path, shade=tmp_path), home/'none', unlabelled=('colour','shade'))

def test_refused(vits, data, home, tmp_path):
    "One line before any work, and nothing is written"
    models,base = vits
    def refused(said, data=data, models=models, **how):
        with pytest.raises((ValueError, OSError), match=said):
            compare(models, base, data, home/'refused', say=lambda o: pytest.fail(o), **how)
        assert not (home/'refused').exists() and not [*home.glob('.refused*')]
    table = pd.read_csv(data['shade'])
    def listed(name):
        table.assign(shot=[name, *table.shot[1:]]).to_csv(data['shade'].parent/'odd.csv', index=False)
        return data | dict(shade=data['shade'].parent/'odd.csv')
    refused('outside|leaves|lies|\\.\\.', listed('../colours/red/0.png'))
    refused('not there', listed('files/gone.png'))
    (tmp_path/'a.csv').write_text('text,label\n'+'some words,red\n'*50)
    refused('no columns? of images', data | dict(colour=tmp_path/'a.csv'))
    (tmp_path/'a.doc').write_text('x')
    refused('no table that is known', data | dict(colour=tmp_path/'a.doc'))
    refused('size is given without arch', size=32)
    refused('is no classifier of torchvision', arch='resnet_18')

@pytest.fixture(scope='module')
def dicts(home):
    "State dicts of a small network with BatchNorm"
    rows,name = pictures(200, 5),'shufflenet_v2_x0_5'
    make = zoo.get_model_weights(name).DEFAULT.transforms(crop_size=32, resize_size=32)
    x = torch.stack([make(o[0]) for o in rows])
    torch.manual_seed(0)
    base = zoo.get_model(name, num_classes=5)
    torch.save(base.state_dict(), home/'base.pt')
    for i,(t,names,k) in enumerate((('colour', [*colours], 1), ('shade', [*shades], 2))):
        m = zoo.get_model(name, num_classes=len(names))
        m.load_state_dict({k: v for k,v in base.state_dict().items() if not k.startswith('fc.')}, strict=False)
        sd = trained(m, x, torch.tensor([sorted(names).index(o[k]) for o in rows]), i, 20).state_dict()
        torch.save(sd, home/f'{t}.pt') if i else save_file(sd, home/f'{t}.safetensors')
    return dict(colour=home/'colour.safetensors', shade=home/'shade.pt'),home/'base.pt',name

def numbered(data, home):
    "Tables whose labels are numbers: a state dict has no names"
    rows = [dict(shot=str(p.relative_to(home/'colours')), y=i) for i,c in enumerate(sorted(colours)) for p in sorted((home/'colours'/c).iterdir())]
    pd.DataFrame(rows).to_csv(home/'colours'/'list.csv', index=False)
    table = pd.read_csv(data['shade'])
    table.assign(brightness=[sorted(shades).index(o) for o in table.brightness]).to_csv(home/'shades'/'numbers.csv', index=False)
    return dict(colour=home/'colours'/'list.csv', shade=home/'shades'/'numbers.csv')

def test_state_dicts(dicts, data, home):
    "torchvision's architecture is named, classes are counted, BatchNorm is measured again"
    models,base,arch = dicts
    said = []
    table = compare(models, base, numbered(data, home), home/'conv', arch=arch, size=32, budget='30s', say=said.append).set_index('row')
    assert 'average, BatchNorm measured again' in table.index and any('torchvision' in o for o in said)
    net = zoo.get_model(arch, num_classes=3)
    net.load_state_dict(load_task(home/'conv'/'merged', 'colour'))
    with pytest.raises(ValueError, match='is no resnet18 of torchvision'):
        compare(models, base, numbered(data, home), home/'odd', arch='resnet18', say=lambda o: None)

def test_killed_and_gone_on_with(vits, data, home):
    "Whenever it is killed, the same command ends with the same table and weights; other settings are refused meanwhile"
    models,base = vits
    (home/'script.py').write_text('import sys\nfrom spectrum_merging.cli import compare_cli\nsys.exit(compare_cli())\n')
    # The budget decides what is compared: generous here, so that the same rows fit each time.
    def command(out, *more): return [sys.executable, str(home/'script.py'), *(f'{t}={o}' for t,o in models.items()), '--base', str(base),
        '--data', *(f'{t}={o}' for t,o in data.items()), '--out', str(out), '--budget', '30m', *more]
    env = os.environ | dict(SPECTRUM_CACHE=str(home/'cache2'))
    for wait in (6, 20):
        p = subprocess.Popen(command(home/'killed'), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # so many answers more than before, then a blow
        stored,end = len([*(home/'cache2').rglob('*.npz')]),time.time()+120
        while p.poll() is None and len([*(home/'cache2').rglob('*.npz')])<stored+wait and time.time()<end: time.sleep(.02)
        p.send_signal(signal.SIGKILL)
        p.communicate()
    assert not (home/'killed').exists()
    if (home/'.killed.comparison.json').exists():
        other = subprocess.run(command(home/'killed', '--seed', '7'), env=env, capture_output=True, text=True)
        assert other.returncode==1 and 'unfinished comparison of other' in other.stderr
    done = subprocess.run(command(home/'killed'), env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    whole = subprocess.run(command(home/'whole'), env=os.environ | dict(SPECTRUM_CACHE=str(home/'cache3')), capture_output=True, text=True)
    assert not whole.returncode, whole.stderr
    for o in 'table.csv','per_task.csv','merged/model.safetensors': assert (home/'killed'/o).read_bytes()==(home/'whole'/o).read_bytes(), o
    assert not [*home.glob('.killed*')]

"Layers fitted block by block: the same numbers as with whole networks, after an interruption too."
import re, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest, torch
import transformers as T
from torch import nn
from spectrum_merging import carried, match
from spectrum_merging.checkpoint import Checkpoint
from spectrum_merging.chain import Merge, repair_recipe
from spectrum_merging.fitted import Network, batches_of, merge_fitted, own_modules, repaired
from spectrum_merging.lab.images import ImageBudget, Images
from spectrum_merging.lab.merges import Lab
from spectrum_merging.lab.tasks import digits_tasks, generated_texts, take
from spectrum_merging.lab.texts import TextBudget, Texts, load_classifier, load_tokenizer, tiny_base
from spectrum_merging.merge import load_model, load_task, merge
from spectrum_merging.plan import FITTED, Plan, make_plan
from spectrum_merging.rowfit import Rows, fit_rows
from spectrum_merging.units import tensor_name
from spectrum_merging.unlabelled import read_inputs
from spectrum_merging.verify import verify

words = ['[PAD]','[UNK]',*'a film of no great depth but much wit and some charm in its slow and lovely end'.split()]
vocab = {w: i for i,w in enumerate(dict.fromkeys(words))}
text = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=len(vocab), max_position_embeddings=24)
image = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4)

# name: class, configuration by number of labels, kind of inputs
nets = {'bert': (T.BertForSequenceClassification, lambda n: T.BertConfig(**text, num_labels=n), 'text'),
    'roberta': (T.RobertaForSequenceClassification, lambda n: T.RobertaConfig(**text, num_labels=n, pad_token_id=0), 'text'),
    'distilbert': (T.DistilBertForSequenceClassification, lambda n: T.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=24,
        vocab_size=len(vocab), num_labels=n), 'text'),
    'electra': (T.ElectraForSequenceClassification, lambda n: T.ElectraConfig(**text, embedding_size=8, num_labels=n), 'text'),
    'modernbert': (T.ModernBertForSequenceClassification, lambda n: T.ModernBertConfig(**text, num_labels=n, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, cls_token_id=1, sep_token_id=1), 'text'),
    'gpt2': (T.GPT2LMHeadModel, lambda n: T.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=len(vocab), n_positions=24, bos_token_id=1, eos_token_id=1), 'text'),
    'llama': (T.LlamaForCausalLM, lambda n: T.LlamaConfig(**text, num_key_value_heads=1), 'text'),
    'llama classifier': (T.LlamaForSequenceClassification, lambda n: T.LlamaConfig(**text, num_key_value_heads=1, num_labels=n, pad_token_id=0), 'text'),
    'gemma2': (T.Gemma2ForCausalLM, lambda n: T.Gemma2Config(**text, num_key_value_heads=1, head_dim=8, sliding_window=4), 'text'),
    'llama with biases': (T.LlamaForCausalLM, lambda n: T.LlamaConfig(**text, num_key_value_heads=1, attention_bias=True, mlp_bias=True), 'text'),
    'opt': (T.OPTForCausalLM, lambda n: T.OPTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=24, vocab_size=len(vocab),
        max_position_embeddings=24, word_embed_proj_dim=16, pad_token_id=0), 'text'),
    'vit': (T.ViTForImageClassification, lambda n: T.ViTConfig(**image, num_labels=n), 'image'),
    'deit': (T.DeiTForImageClassification, lambda n: T.DeiTConfig(**image, num_labels=n), 'image')}

def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    tok = Tokenizer(models.WordLevel(vocab, '[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='[PAD]', unk_token='[UNK]', eos_token='[UNK]')

def sentences(n, seed=0):
    g = np.random.default_rng(seed)
    return [' '.join(g.choice(list(vocab)[2:], g.integers(3, 14))) for _ in range(n)]

def made(d, name, dtype=torch.float32):
    "`{task: folder}`, `{task: inputs}` of two experts with 2 and 5 labels"
    cls,config,kind = nets[name]
    models,inputs = {},{}
    for i,(t,n) in enumerate(dict(mood=2, topic=5).items()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = cls(config(n)).eval()
        g = torch.Generator().manual_seed(i+1)
        for p in net.parameters(): p.data += .1*torch.randn(p.shape, generator=g)
        net.to(dtype).save_pretrained(d/t)
        models[t],inputs[t] = str(d/t),d/(f'{t}.txt' if kind=='text' else f'{t}_images')
        if kind=='text':
            tokenizer().save_pretrained(d/t)
            inputs[t].write_text('\n'.join(sentences(70+20*i, i)))
            continue
        from PIL import Image
        T.ViTImageProcessor(size=dict(height=16, width=16)).save_pretrained(d/t)
        inputs[t].mkdir()
        g = np.random.default_rng(i)
        for j in range(60): Image.fromarray(g.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(inputs[t]/f'{j}.png')
    return models,inputs

def whole(models, inputs, repairs, plan, d):
    "What whole networks give: `{task: state dict}`"
    plain = merge(plan, models, out=d/'plain')
    nets = {t: Network(t, Checkpoint(o)) for t,o in models.items()}
    batches = {t: batches_of(n, read_inputs(inputs[t], t)) for t,n in nets.items()}
    heads = own_modules({tensor_name(k) for k,role in zip(plan.table.name, plan.table.role) if role=='head' or '@' in k}, nets)
    start = {t: load_model(plain, t if (plain/'heads').exists() else None, attn_implementation='eager').float() for t in models}
    done,_ = repaired([repair_recipe(o) for o in repairs], start, {t: n.expert() for t,n in nets.items()}, batches, heads)
    return {t: {nets[t].names[k]: v for k,v in o.state_dict().items() if k in nets[t].names} for t,o in done.items()}

@pytest.mark.parametrize('name', nets)
def test_like_whole_networks(tmp_path, name):
    "Block by block, body and heads get the numbers that whole networks give them"
    models,inputs = made(tmp_path, name)
    plan = make_plan('standard', models)
    own = plan.table.name.str.contains('@').any()
    repairs,said = ['match','heads'] if own else ['match'],[]
    out = merge_fitted(plan, models, out=tmp_path/'out', repairs=repairs, inputs=inputs, say=said.append)
    assert any(o.startswith('fitted block by block') and '3 blocks' in o for o in said), said
    want = whole(models, inputs, repairs, plan, tmp_path)
    for t in models:
        found = load_task(out, t if own else None)
        for k,v in want[t].items():
            if k in found: assert v.allclose(found[k], rtol=1e-3, atol=1e-4), (t, k, (v-found[k]).abs().max())
    df = Plan.load(out/'plan.csv').table
    moved = [r.name for r in df.itertuples() if r.op==FITTED]
    assert len(moved)>=12 and verify(out, all=True).ok.all()
    assert not list(tmp_path.glob('.*.partial'))

def differs(out, made):
    "Largest difference of a fitted folder's tensors from others, as a share of their size; `made` has `{task: {name in the file: tensor}}`"
    def state(t): return load_task(out, t if (out/'heads').exists() else None)
    pairs = [(state(t)[k].float(), v) for t,sd in made.items() for k,v in sd.items() if v.is_floating_point()]
    return max(float((a-b).norm()/b.norm().clamp(min=1e-6)) for a,b in pairs)

def test_experiments_texts(tmp_path):
    "What the experiments fit in memory, the command fits block by block: the same weights from the same sentences"
    base,found,experts = tiny_base(tmp_path/'cache'),generated_texts(['SST-2','Emotion']),{}
    for i,(t,o) in enumerate(found.items()):
        net,experts[t],g = load_classifier(base.path, o.names, i),tmp_path/t,torch.Generator().manual_seed(i)
        for p in net.parameters(): p.data += .05*torch.randn(p.shape, generator=g)
        for o in net,load_tokenizer(base.path): o.save_pretrained(experts[t])
    lab = Lab(Texts(), found, TextBudget(train=320, test=40), base, 0, tmp_path/'cache', False, experts)
    n,models,inputs = 60,{t.lower(): o.path for t,o in lab.modules.items()},{}
    for t,o in lab.tasks.items():
        inputs[t.lower()] = tmp_path/f'{t}.txt'
        inputs[t.lower()].write_text('\n'.join(take(o.x, lab.kind.pick(len(o.x), n, lab.seed))))
    for strategy,repairs in (('standard', ['match','heads']), ('ridge_mean', ['match'])):
        merged,said = Merge(lab.plan(strategy)),[]
        for o in repairs: merged = merged.then(dict(heads='refit').get(o, o), n)
        start = base.path if strategy!='standard' else None
        out = merge_fitted(make_plan(strategy, models, start), models, start, tmp_path/strategy, repairs=repairs, inputs=inputs, say=said.append)
        assert any(o.startswith('fitted block by block') for o in said), said
        assert differs(out, {t.lower(): sd for t,sd in lab.states(merged).items()})<1e-4

# ResNet-18 of torchvision and of transformers: one network, two sets of names
def resnet_name(k):
    for a,b in ((r'^conv1', 'resnet.embedder.embedder.convolution'), (r'^bn1', 'resnet.embedder.embedder.normalization'), (r'downsample\.0', 'shortcut.convolution'),
        (r'downsample\.1', 'shortcut.normalization'), (r'^fc', 'classifier.1')): k = re.sub(a, b, k)
    k = re.sub(r'^layer(\d)\.(\d)', lambda m: f'resnet.encoder.stages.{int(m[1])-1}.layers.{m[2]}', k)
    return re.sub(r'\.(conv|bn)(\d)\.', lambda m: f'.layer.{int(m[2])-1}.{dict(conv="convolution", bn="normalization")[m[1]]}.', k)

def test_experiments_images(tmp_path):
    "So with images, where statistics of BatchNorms count and the whole network is in memory, which is said"
    from PIL import Image
    lab = Lab(Images(), digits_tasks(), ImageBudget(base_epochs=1, expert_steps=15, max_epochs=2, batch=64, train=256, test=64, width=8), cache=tmp_path/'cache', progress=False)
    n,models,inputs = 60,{},{}
    for i,(t,o) in enumerate(lab.tasks.items()):
        config = T.ResNetConfig(layer_type='basic', depths=[2]*4, hidden_sizes=[8,16,32,64], embedding_size=8, num_labels=o.classes)
        net = T.ResNetForImageClassification(config)
        net.load_state_dict({resnet_name(k): v for k,v in lab.experts[t].items()})
        models[f't{i}'],inputs[f't{i}'] = str(tmp_path/f't{i}'),tmp_path/f'images{i}'
        net.save_pretrained(models[f't{i}'])
        T.ViTImageProcessor(do_resize=False, image_mean=[72/255]*3, image_std=[90/255]*3).save_pretrained(models[f't{i}'])
        inputs[f't{i}'].mkdir()
        for j,x in enumerate(take(o.x, lab.kind.pick(len(o.x), n, lab.seed))): Image.fromarray(x[0].numpy()).save(inputs[f't{i}']/f'{j:03}.png')
    for repairs in (['match','heads'], ['batchnorm'], ['repair']):
        merged,said = lab.average(),[]
        for o in repairs: merged = merged.then(dict(heads='refit', repair='channels').get(o, o), n)
        out = merge_fitted(make_plan('standard', models), models, out=tmp_path/repairs[0], repairs=repairs, inputs=inputs, say=said.append)
        assert repairs[0]!='match' or any('it has BatchNorms' in o and 'GB of memory' in o for o in said), said
        made = {f't{i}': {resnet_name(k): v for k,v in sd.items()} for i,sd in enumerate(lab.states(merged).values())}
        assert differs(out, made)<1e-3, repairs

@pytest.mark.parametrize('rows,inn,out,dead,bias', [(9,40,7,0,True), (9,40,7,0,False), (300,40,7,0,True), (300,40,7,20,True), (9,40,7,30,True), (60,600,3000,0,True)])
def test_rows(rows, inn, out, dead, bias):
    "A layer fitted from rows on the disk is the layer fitted from rows in memory"
    g = torch.Generator().manual_seed(rows)
    X,Z,true = Rows(inn),Rows(out),torch.randn(out, inn, generator=g)
    for t in 'ab':
        for h in (0, 1):
            for j in range(3):
                x = torch.randn(rows//3+j+(t=='b'), inn, generator=g)+1
                x[:,:dead] = 0
                X.add(t, h, x)
                Z.add(t, h, x@true.T+2+.1*torch.randn(len(x), out, generator=g))
    def both(o): return {t: [torch.cat(list(o.chunks(t, h))) for h in (0, 1)] for t in o.tasks}
    one,two = (nn.Linear(inn, out, bias=bias).requires_grad_(False) for _ in range(2))
    two.load_state_dict(one.state_dict())
    fit_rows(one, X, Z, .03)
    match._fit(two, None, both(X), both(Z), True, .03)
    for k,v in one.state_dict().items(): assert v.allclose(two.state_dict()[k], rtol=1e-4, atol=1e-4*float(v.abs().max())), k

def test_one_word(tmp_path):
    "A tokenizer that knows no word is refused: all inputs are one, and a fit to them means nothing"
    models,inputs = made(tmp_path, 'llama')
    inputs['topic'].write_text('\n'.join(f'unheard {i}' for i in range(60)))
    with pytest.raises(ValueError, match='knows no word'): merge_fitted(make_plan('standard', models), models, out=tmp_path/'out', repairs=['match'], inputs=inputs)

@pytest.mark.parametrize('bias', (True, False))
def test_still_inputs(bias):
    "Inputs that vary by rounding alone leave the weight, in memory and from the disk"
    one,two = (nn.Linear(8, 4, bias=bias).requires_grad_(False) for _ in range(2))
    two.load_state_dict(one.state_dict())
    x,z = torch.randn(8).expand(50, 8).clone(),torch.randn(4).expand(50, 4).clone()
    if not bias: x[:],z[:] = 0,1
    X,Z,was = Rows(8),Rows(4),one.weight.clone()
    for h in (0, 1):
        X.add('a', h, x)
        Z.add('a', h, z)
    fit_rows(one, X, Z, .03)
    match._fit(two, None, dict(a=[x, x]), dict(a=[z, z]), True, .03)
    for m in (one, two):
        assert m.weight.allclose(was)
        if bias: assert m(x[0]).allclose(z[0], atol=1e-5)

class Killed(BaseException): pass

@pytest.mark.parametrize('at', range(5))
def test_goes_on(tmp_path, monkeypatch, at):
    "Stopped in any block, while it is written too, the same command ends with the same bytes; what was done is not done again"
    models,inputs = made(tmp_path, 'bert', torch.bfloat16)
    def run(out, **more): return merge_fitted(make_plan('standard', models), models, out=out, repairs=['match','heads'], inputs=inputs, **more)
    want,fits = run(tmp_path/'want'),[]
    finish,fit = carried.Kept.finish,carried.fit_rows
    def stop(self, i, fitted):
        if i==at:
            if at%2: finish(self, i, fitted)
            else:
                for r in self.rows[self.segments[i]][:1]: self.part.write(self.where[r.name][0], b'torn', self.where[r.name][1])
            raise Killed
        finish(self, i, fitted)
    monkeypatch.setattr(carried.Kept, 'finish', stop)
    with pytest.raises(Killed): run(tmp_path/'out')
    monkeypatch.setattr(carried.Kept, 'finish', finish)
    monkeypatch.setattr(carried, 'fit_rows', lambda *a: (fits.append(1), fit(*a)))
    said = []
    out = run(tmp_path/'out', say=said.append)
    for o in sorted(want.rglob('*.safetensors')): assert o.read_bytes()==(out/o.relative_to(want)).read_bytes(), o
    done = at+at%2
    assert len(fits)==6*max(0, 3-max(0, done-1))+3*(done<5) and bool(done)==any('goes on' in o for o in said)

def large_pair(d):
    "Two Llama-shaped experts of 1.5 GB, and 64 texts for each"
    config = T.LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=14, num_attention_heads=16, num_key_value_heads=4)
    for i,t in enumerate('xy'):
        torch.manual_seed(0)
        net = T.LlamaForCausalLM(config).to(torch.bfloat16)
        for p in net.parameters(): p.data += .01*torch.randn(p.shape, generator=torch.Generator().manual_seed(i+1), dtype=torch.bfloat16)
        for o in net,tokenizer(): o.save_pretrained(d/t)
        (d/f'{t}.txt').write_text('\n'.join(sentences(64, i)))

# A process without large libraries, whose children's largest peak is that of the command
peak = 'import resource,subprocess,sys; p = subprocess.run(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024); sys.exit(p.returncode)'

def test_large(tmp_path, request):
    "A pair of 1.5 GB stays below 1.5 GB of memory, pages of files included; killed at three moments, the same command ends with the same bytes"
    if not request.config.getoption('--long'): pytest.skip('a pair of 1.5 GB takes 5 GB of the disk and some ten minutes: --long')
    large_pair(tmp_path)
    def command(out): return ['spectrum-merge', 'x=x', 'y=y', '--out', out, '--repair', 'match', '--inputs', 'x=x.txt', 'y=y.txt']
    began = time.time()
    said = subprocess.run([sys.executable, '-c', peak, *command('want')], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    took = time.time()-began
    assert 'fitted block by block' in said and int(said.split()[-1])<1.5e9, said
    for _ in range(3):
        p = subprocess.Popen(command('out'), cwd=tmp_path, stdout=subprocess.DEVNULL)
        time.sleep(.2*took)
        p.kill()
        assert p.wait()==-signal.SIGKILL
    assert 'goes on' in subprocess.run(command('out'), cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    for o in (tmp_path/'want').glob('*.safetensors'): assert o.read_bytes()==(tmp_path/'out'/o.name).read_bytes()

"Layers are fitted where they compute what is fitted, in networks of every kind; the rest is counted, or the fit refused."
import copy, warnings
import pytest, torch
from torch import nn
from spectrum_merging.activations import coverage, input_grams, patches, rows, sharing
from spectrum_merging.batches import at_mask, feed, mask_of, prepared
from spectrum_merging.match import match_heads, match_layers
from spectrum_merging.merge import merge, task_state
from spectrum_merging.plan import make_plan
from spectrum_merging.repair import reestimate_bn, repair_channels
import transformers as T

text = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=60, max_position_embeddings=40)
image = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4)
seq2seq = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
    decoder_ffn_dim=32, vocab_size=60)
special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
audio = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_stride=(5, 2),
    conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.)

# name: class, configuration, kind of inputs, least share that is covered
nets = {'bert': (T.BertForSequenceClassification, T.BertConfig(**text), 'text', 1), 'bert lm': (T.BertForMaskedLM, T.BertConfig(**text), 'text', 1),
    'distilbert': (T.DistilBertForSequenceClassification, T.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=60), 'text', 1),
    'roberta': (T.RobertaForSequenceClassification, T.RobertaConfig(**text), 'text', 1),
    'deberta': (T.DebertaForSequenceClassification, T.DebertaConfig(**text, relative_attention=True, pos_att_type=['p2c','c2p']), 'text', .7),
    'deberta v2': (T.DebertaV2ForSequenceClassification, T.DebertaV2Config(**text, relative_attention=True, pos_att_type=['p2c','c2p'],
        position_buckets=8, share_att_key=True), 'text', .7),
    'electra': (T.ElectraForSequenceClassification, T.ElectraConfig(**text, embedding_size=8), 'text', 1),
    'gpt2': (T.GPT2LMHeadModel, T.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=60, n_positions=40, bos_token_id=1, eos_token_id=1), 'text', 1),
    'llama': (T.LlamaForCausalLM, T.LlamaConfig(**text, num_key_value_heads=1), 'text', 1),
    'mistral': (T.MistralForCausalLM, T.MistralConfig(**text, num_key_value_heads=1), 'text', 1),
    't5': (T.T5ForConditionalGeneration, T.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=60, decoder_start_token_id=0),
        'text to text', 1),
    'bart': (T.BartForConditionalGeneration, T.BartConfig(**seq2seq, max_position_embeddings=40), 'text', 1),
    'vit': (T.ViTForImageClassification, T.ViTConfig(**image), 'image', 1),
    'swin': (T.SwinForImageClassification, T.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1,1], num_heads=[2,2], window_size=4), 'image', .9),
    'resnet': (T.ResNetForImageClassification, T.ResNetConfig(embedding_size=8, hidden_sizes=[8,16], depths=[1,1], layer_type='basic'), 'image', 1),
    'convnext': (T.ConvNextForImageClassification, T.ConvNextConfig(hidden_sizes=[16,32], depths=[1,1], num_stages=2, patch_size=2), 'image', .8),
    'wav2vec2': (T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**audio), 'sound', .8),
    'whisper': (T.WhisperForConditionalGeneration, T.WhisperConfig(**seq2seq, **special, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        decoder_start_token_id=1), 'spectrogram', 1),
    'clip': (T.CLIPModel, T.CLIPConfig(text_config=text | special, vision_config=image, projection_dim=8), 'text and image', 1)}

def inputs(kind, seed, n=20):
    "Three batches of other lengths, as tokenizers and processors give them"
    g,res = torch.Generator().manual_seed(seed),[]
    def ids(size, low=3): return torch.randint(low, 60, size, generator=g)
    for length in (9, 12, 7):
        mask = (torch.arange(length)<torch.randint(3, length+1, (n, 1), generator=g)).long()
        words = dict(input_ids=ids((n, length))*mask, attention_mask=mask)
        pixels = dict(pixel_values=torch.randn(n, 3, 16, 16, generator=g))
        res.append({'text': words | dict(idx=list(range(n))), 'image': pixels, 'text and image': words | pixels,
            'text to text': words | dict(labels=ids((n, 5))), 'sound': dict(input_values=torch.randn(n, 400, generator=g)),
            'spectrogram': dict(input_features=torch.randn(n, 8, 40, generator=g), decoder_input_ids=ids((n, length)))}[kind])
    return res

def made(name, seed=0):
    cls,config,*_ = nets[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = cls(copy.deepcopy(config)).eval()
        for m in net.modules():
            if not isinstance(m, nn.BatchNorm2d): continue
            nn.init.normal_(m.weight) # of both signs
            m.running_var.uniform_(.5, 2)
            m.running_mean.normal_()
    return net

def moved(net, seed, by=.2):
    res,g = copy.deepcopy(net),torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in res.parameters(): p.add_(by*torch.randn(p.shape, generator=g)*(p.std() if p.numel()>1 and p.std()>0 else .1))
    return res

def mean_of(a, b):
    res,other = copy.deepcopy(a),b.state_dict()
    res.load_state_dict({k: (v+other[k])/2 if v.is_floating_point() else v for k,v in a.state_dict().items()})
    return res

@torch.no_grad()
def outputs(net, batches, names):
    "`{layer: outputs}` of all batches, without padding"
    found,mods,masks = {k: [] for k in names},dict(net.named_modules()),[]
    def look(k, o):
        mask = at_mask(o, masks)
        found[k].append((o if mask is None else o[mask]).clone().flatten())
    hooks = [mods[k].register_forward_hook(lambda m, i, o, k=k: look(k, o)) for k in names]
    for x in prepared(batches, net):
        masks = mask_of(x, net)
        feed(net, x)
    for o in hooks: o.remove()
    return {k: torch.cat(v) for k,v in found.items()}

def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)

@pytest.mark.parametrize('name', nets)
def test_every_architecture(name):
    "Equal experts change nothing; the layers of other ones come closer to them, above all the last; tied tensors and tables stay"
    *_,kind,least = nets[name]
    net,batches = made(name),dict(a=inputs(kind, 1), b=inputs(kind, 2))
    found = coverage(net, batches['a'][0])
    assert found.share>=least and (found.share>=.9 or found.left)
    seen = [o.bn or o.name for o in found.layers]
    same = quiet(match_layers, net, dict(a=net, b=net), batches)['a']
    for k,v in outputs(same, batches['a'], seen).items():
        want = outputs(net, batches['a'], [k])[k]
        assert (v-want).abs().max() <= 2e-5*want.abs().max(), k
    experts = dict(a=moved(net, 1), b=moved(net, 2))
    start = mean_of(*experts.values())
    fitted = quiet(match_layers, start, experts, batches)
    goal = {t: outputs(e, batches[t], seen) for t,e in experts.items()}
    def errors(m):
        "Of each layer, relative to its variance, mean over both tasks"
        own = {t: outputs(m[t], batches[t], seen) for t in experts}
        return torch.tensor([sum((own[t][k]-goal[t][k]).square().mean().item()/(goal[t][k].var().item()+1e-12) for t in experts) for k in seen])
    before,after = errors(dict(a=start, b=start)),errors(fitted)
    assert after.sum()<before.sum() and after[-1]<=before[-1]*1.001 and (after<=before*1.05+1e-6).all()
    one,other = (o.state_dict() for o in fitted.values())
    assert all(v.equal(other[k]) for k,v in one.items())
    shared,was = sharing(start),start.state_dict()
    may = {f'{o}.{leaf}' for l in found.layers for o in (l.name, l.bn) if o for leaf in ('weight','bias','running_mean','running_var')}
    for k,v in one.items():
        if k not in may: assert v.equal(was[k]), k
        else: assert len(shared.get(k, [k]))==1, k

def test_the_issue():
    "GPT-2: all layers of the body are found, the tied output layer is not, and the loss falls"
    net = made('gpt2')
    batches = dict(a=inputs('text', 1), b=inputs('text', 2))
    found = coverage(net, batches['a'][0])
    assert found.share==1 and len(found.layers)==8 and 'lm_head' not in [o.name for o in found.layers]
    untied = copy.deepcopy(net)
    untied.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    assert coverage(untied, batches['a'][0]).layers==found.layers

@pytest.mark.parametrize('cls,config,words', [
    (T.MixtralForCausalLM, T.MixtralConfig(**text, num_key_value_heads=1, num_local_experts=4), r'experts in one tensor.*least=0'),
    (T.AlbertForSequenceClassification, T.AlbertConfig(**text, embedding_size=8), r'runs 2 times in a pass.*least=0')])
def test_refused_below_half(cls, config, words):
    "Nothing is touched, and nothing warned of"
    net = cls(config).eval()
    with pytest.raises(ValueError, match=words): match_layers(net, dict(a=net), dict(a=inputs('text', 1)))
    fitted = quiet(match_layers, net, dict(a=net), dict(a=inputs('text', 1)), least=0)['a']
    assert all(v.allclose(net.state_dict()[k], atol=1e-4) for k,v in fitted.state_dict().items())

def test_said_below_nine_tenths():
    net = made('convnext')
    with pytest.warns(UserWarning, match='84% of the body.*a grouped convolution'):
        match_layers(net, dict(a=net), dict(a=inputs('image', 1)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        match_layers(made('bert'), dict(a=made('bert')), dict(a=inputs('text', 1)))

class Named(nn.Module):
    "Any layer in the middle of others"
    def __init__(self, layer):
        super().__init__()
        self.first,self.layer,self.last = nn.Linear(8, 8),layer,nn.Linear(8, 8)
    def forward(self, x): return self.last(self.layer(self.first(x)))

class Doubled(nn.Linear):
    def forward(self, x): return 2*super().forward(x)
class Turned(nn.Module):
    "Channels first for a moment"
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
    def forward(self, x): return self.conv(x.movedim(1, 2)).movedim(1, 2)

@pytest.mark.parametrize('layer,why', [(nn.Linear(8, 8), None), (Doubled(8, 8), 'computes something else'),
    (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 'computed from others'), (T.pytorch_utils.Conv1D(8, 8), None),
    (Turned(nn.Conv1d(8, 8, 3, padding=1)), None), (Turned(nn.Conv1d(8, 8, 3, padding='same', padding_mode='circular')), None),
    (Turned(nn.Conv1d(8, 8, 3, padding=1, groups=2)), 'a grouped convolution'),
    (Turned(nn.ConvTranspose1d(8, 8, 3, padding=1)), 'a transposed convolution')], ids=lambda o: type(o).__name__ if isinstance(o, nn.Module) else None)
def test_layers(layer, why):
    net,x = Named(layer),torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
    found = coverage(net, x)
    assert [o.name.startswith('layer') for o in found.layers]==([False, True, False] if why is None else [False, False])
    assert all(why in o for o in found.left.values()) and bool(found.left)==(why is not None)
    other = moved(net, 1) if why!='computed from others' else net
    fitted = quiet(match_layers, moved(other, 2), dict(a=other), dict(a=[x]), ridge=1e-6, least=0)['a']
    with torch.no_grad(): a,b = fitted(x),other(x)
    assert (a-b).square().mean()<(1e-4 if why is None else .1)*b.var()

@pytest.mark.parametrize('conv,shape', [(nn.Conv1d(3, 4, 5, stride=2, padding=2, dilation=2), (3, 30)), (nn.Conv1d(3, 4, 1), (3, 9)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect'), (3, 8, 8)), (nn.Conv2d(3, 4, (2, 3), padding=(0, 1), padding_mode='circular'), (3, 8, 8))])
def test_patches(conv, shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): torch.testing.assert_close(patches(x, conv)@conv.weight.flatten(1).T+conv.bias, rows(conv(x), conv), atol=1e-5, rtol=1e-5)

def test_forms_of_batches():
    "A dict, a tokenizer's encoding, a tuple, a DataLoader: the same fit; padding has no influence"
    from torch.utils.data import DataLoader, TensorDataset
    net = made('bert')
    expert,start = moved(net, 1),moved(net, 2)
    batch = {k: v for k,v in inputs('text', 1, 40)[1].items() if k!='idx'}
    def fit(x): return match_layers(start, dict(a=expert), dict(a=x))['a'].state_dict()
    want = fit([batch])
    parts = batch['input_ids'],batch['attention_mask']
    forms = dict(encoding=[T.BatchEncoding(batch)], alone=T.BatchEncoding(batch), pair=[parts], labelled=[(*parts, torch.zeros(40).long())],
        loader=DataLoader(TensorDataset(*parts, torch.zeros(40).long()), 20), halves=[{k: v[:20] for k,v in batch.items()}, {k: v[20:] for k,v in batch.items()}])
    for name,o in forms.items(): assert all(v.allclose(want[k], atol=1e-5) for k,v in fit(o).items()), name
    other = fit([batch | dict(input_ids=torch.where(batch['attention_mask']>0, batch['input_ids'], 7))])
    assert all(v.allclose(want[k], atol=1e-5) for k,v in other.items())

@pytest.mark.parametrize('batches,words', [([dict(input_ids=[[1, 2], [3]])], "return_tensors='pt'"), ([dict(text=['a', 'b'])], 'without tensors'),
    ([{}], 'without tensors'), ([], 'empty'), ([dict(input_ids=torch.ones(4, 3).long(), attention_mask=torch.ones(2, 3).long())], '2 and 4 inputs'),
    ([dict(pixel_values=torch.ones(4, 3, 8, 8))], 'does not run on these inputs'), ([dict(input_ids=torch.full((4, 3), 60))], 'does not run on these inputs'),
    ([dict(input_ids=torch.ones(4, 3).long()), torch.ones(4, 3).long()], '2 kinds')])
def test_wrong_batches(batches, words):
    net = made('bert')
    with pytest.raises(ValueError, match=words): match_layers(net, dict(a=net), dict(a=batches))

def test_other_architectures():
    net,deep = made('bert'),T.BertForSequenceClassification(T.BertConfig(**text | dict(num_hidden_layers=1)))
    with pytest.raises(ValueError, match='expert of b has no layer'): match_layers(net, dict(b=deep), dict(b=inputs('text', 1)))
    wide = T.BertForSequenceClassification(T.BertConfig(**text | dict(intermediate_size=48)))
    with pytest.raises(ValueError, match='in the merged model and the expert of b'): match_layers(net, dict(b=wide), dict(b=inputs('text', 1)))

def test_heads_of_transformers():
    "A head of two layers, masks from the batches; a tied head is refused, and a table of logits that would not fit"
    batches = dict(a=inputs('text', 1, 60))
    for name in ('bert', 'roberta'):
        expert = made(name)
        merged = moved(expert, 1, .1)
        before = copy.deepcopy(merged)
        found = match_heads(merged, dict(a=expert), batches)['a']
        def far(m):
            with torch.no_grad(): return sum((feed(m, x).logits-feed(expert, x).logits).square().sum() for x in prepared(batches['a'], m))
        before.classifier.load_state_dict(expert.classifier.state_dict())
        assert far(found)<far(before)
    net = made('gpt2')
    with pytest.raises(ValueError, match='lm_head.weight: shares memory with transformer.wte.weight'):
        match_heads(net, dict(a=net), batches, heads=['lm_head'])
    llama = T.LlamaForCausalLM(T.LlamaConfig(**text | dict(vocab_size=150_000, num_key_value_heads=1)))
    with pytest.raises(ValueError, match='gives 150000 numbers at .* positions'): match_heads(llama, dict(a=llama), dict(a=inputs('text', 1, 200)), heads=['lm_head'])

def test_grams_leave_padding_out():
    "Moments of a padded batch are those of its sentences alone; RegMean of equal experts is the expert"
    net,x = made('gpt2'),inputs('text', 1, 12)[0]
    alone = [dict(input_ids=o[None,:n]) for o,n in zip(x['input_ids'], x['attention_mask'].sum(1).tolist())]
    whole,parts = input_grams(net, [x]),input_grams(net, alone)
    assert len(whole)>8 # the tied output layer, too
    for k,v in whole.items(): torch.testing.assert_close(v, parts[k], atol=1e-4, rtol=1e-4)

def test_statistics_from_dicts():
    "BatchNorm and REPAIR read what an image processor gives"
    net,x = made('resnet'),[{k: v for k,v in o.items()} for o in inputs('image', 1)]
    plain = reestimate_bn(net, x)
    assert not plain.resnet.embedder.embedder.normalization.running_mean.equal(net.resnet.embedder.embedder.normalization.running_mean)
    fixed = repair_channels(net, [made('resnet', 1)], x)
    assert all(v.isfinite().all() for v in fixed.state_dict().values() if v.is_floating_point())

"Small convolutions as matrices compute what torch's do: outputs, gradients, training, resumed or not."
import copy, pickle, pytest, torch, torch.nn.functional as F
from torch import nn
from spectrum_merging.lab import convolutions
from spectrum_merging.lab.convolutions import (Folded, fast_convolutions, logits_together, prepare,
    resnet18)

def near(got, want, eps=1e-5): assert (got-want).abs().max() <= eps*want.abs().max()

def both(conv, x):
    "Output and gradients of a convolution as torch computes it and with few outputs as matrices"
    res = []
    for on in (False, True):
        a = x.clone().requires_grad_()
        conv.zero_grad()
        with fast_convolutions(conv, on=on): out = conv(a)
        (out*torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        res.append([out.detach(), a.grad, *(p.grad for p in conv.parameters())])
    return zip(*res)

@pytest.mark.parametrize('kernel,stride,pad', [(3,1,1), (3,2,1), (1,1,0), (1,2,0), (7,2,3), (2,2,0),
    (5,1,2), ((3,1),(2,1),(1,0)), ((1,5),1,(0,2))])
@pytest.mark.parametrize('size', [(1,1), (2,2), (3,3), (4,4), (1,3), (4,1)])
@pytest.mark.parametrize('seed', range(3))
def test_one_convolution(seed, size, kernel, stride, pad):
    "Any kernel, stride, padding, image, batch, memory format; with a bias and without"
    torch.manual_seed(seed)
    conv = nn.Conv2d(5, 7, kernel, stride, pad, bias=seed==1)
    x = torch.randn(1+3*seed, 5, *size)
    k,p = conv.kernel_size,conv.padding
    if any(s+2*b < a for s,a,b in zip(size, k, p)):
        with fast_convolutions(conv, on=True), pytest.raises(RuntimeError, match='[Kk]ernel size'): conv(x)
        return
    if seed==2: conv,x = (o.to(memory_format=torch.channels_last) for o in (conv, x))
    for want,got in both(conv, x):
        assert got.shape==want.shape
        near(got, want)

@pytest.mark.parametrize('how', [dict(groups=2, padding=1), dict(dilation=2, padding=2), dict(padding='same'),
    dict(padding=1, padding_mode='circular')])
def test_others_stay(how):
    "Groups, dilation and other paddings are torch's own: equal to the last bit"
    conv = nn.Conv2d(4, 4, 3, **how)
    x = torch.randn(3, 4, 2, 2)
    want = conv(x)
    with fast_convolutions(conv, on=True):
        assert 'forward' not in vars(conv)
        assert conv(x).equal(want)

def test_off_where_bf16_is_native(monkeypatch):
    "By default it is on exactly where the hardware has no bf16"
    conv = nn.Conv2d(3, 3, 3)
    for native in (True, False):
        monkeypatch.setattr(convolutions, 'has_bf16', lambda: native)
        with fast_convolutions(conv): assert ('forward' in vars(conv))!=native

def test_large_outputs_stay():
    "Where no output is small nothing changes; a single image without a batch is torch's, too"
    conv = nn.Conv2d(3, 8, 3, padding=1)
    for x in (torch.randn(2, 3, 3, 3), torch.randn(2, 3, 16, 16), torch.randn(3, 2, 2)):
        for want,got in both(conv, x): assert got.equal(want)

def step(net, x, y, on):
    "Outputs, loss and gradients of a batch"
    with fast_convolutions(net, on=on):
        out = net(x)
        net.zero_grad()
        F.cross_entropy(out, y).backward()
    return out.detach(),{k: p.grad.clone() for k,p in net.named_parameters()}

@pytest.mark.parametrize('width,batch,seed,frozen', [(64,16,0,True), (32,16,0,True), (32,33,1,True),
    (16,64,2,True), (8,2,3,True), (8,64,4,False)])
def test_network(width, batch, seed, frozen):
    "ResNet-18's outputs and gradients, float32 and with statistics of the batch or of before"
    g = torch.Generator().manual_seed(seed)
    net = resnet18(5, seed=seed, width=width).cpu().train(not frozen)
    x = prepare(torch.randint(0, 256, (batch, 1, 32, 32), generator=g, dtype=torch.uint8)).cpu()
    y = torch.randint(0, 5, (batch,), generator=g)
    (a,ga),(b,gb) = (step(copy.deepcopy(net), x, y, on) for on in (False, True))
    near(b, a)
    # BatchNorm over a batch of single pixels divides by small variances: rounding grows through 20 layers
    for k,v in ga.items(): near(gb[k], v, 1e-5 if frozen else 1e-3)

def test_gradients_in_double():
    "In float64, where rounding is out of the way, training mode has equal gradients, too"
    net = resnet18(5, width=8).cpu().double().train()
    x,y = torch.randn(32, 3, 32, 32, dtype=torch.float64),torch.arange(32)%5
    (a,ga),(b,gb) = (step(copy.deepcopy(net), x, y, on) for on in (False, True))
    near(b, a, 1e-12)
    for k,v in ga.items(): near(gb[k], v, 1e-9)

def test_autocast():
    "Under autocast the numbers are bf16, the gradients float32, near each other"
    net = resnet18(5, width=16).cpu().eval()
    x,y = torch.randn(32, 3, 32, 32),torch.arange(32)%5
    with torch.autocast('cpu', torch.bfloat16):
        (a,ga),(b,gb) = (step(net, x, y, on) for on in (False, True))
    assert a.dtype==b.dtype==torch.bfloat16
    near(b.float(), a.float(), .03)
    for k,v in ga.items():
        assert gb[k].dtype==torch.float32
        assert F.cosine_similarity(gb[k].flatten(), v.flatten(), 0) > .99

def test_nothing_is_left_behind():
    "Names, classes, memory format and forwards are what they were, after an error and in a nest, too"
    net = resnet18(5, width=8).cpu()
    def now():
        return [(k, v.shape, v.stride()) for k,v in net.state_dict().items()],[type(m) for m in net.modules()]
    before = now()
    def swapped(): return sum('forward' in vars(m) for m in net.modules())
    with pytest.raises(KeyError), fast_convolutions(net, on=True) as same:
        assert same is net and swapped()==20 and now()==before
        with fast_convolutions(net, on=True): pass
        assert swapped()==20
        twin = copy.deepcopy(net)
        conv = twin.layer4[1].conv2
        with torch.no_grad(): conv.weight.zero_()
        assert not conv(torch.ones(1, 64, 1, 1)).any() # a copy computes with its own weights
        raise KeyError
    assert swapped()==0 and now()==before
    pickle.dumps(net)
    with fast_convolutions(net, on=False): assert swapped()==0

def test_training_goes_the_same_way_and_resumes():
    "Steps of SGD agree with torch's; stopped, saved and loaded in between they agree to the bit"
    x,y = torch.randn(16, 3, 32, 32, dtype=torch.float64),torch.arange(16)%5
    def fresh(seed):
        net = resnet18(5, width=8, seed=seed).cpu().double().train()
        return net,torch.optim.SGD(net.parameters(), .01, momentum=.9, nesterov=True, weight_decay=5e-4)
    def train(on, cuts):
        net,opt = fresh(0)
        for n in cuts:
            with fast_convolutions(net, on=on):
                for _ in range(n):
                    opt.zero_grad()
                    F.cross_entropy(net(x), y).backward()
                    opt.step()
            saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
            net,opt = fresh(1)
            for part,state in zip((net, opt), saved): part.load_state_dict(state)
        return net.state_dict()
    want,whole,parts = train(False, [4]),train(True, [4]),train(True, [1, 3])
    for k,v in want.items():
        if v.is_floating_point(): near(whole[k], v, 1e-7)
        assert parts[k].equal(whole[k])

def test_width_of_a_state():
    "The width is the state's; a body of another width or depth is refused"
    half = resnet18(7, width=32, seed=3).cpu().state_dict()
    assert resnet18(5, half).fc.weight.shape==(5, 256)
    same = resnet18(7, half, width=64).cpu().state_dict()
    assert list(same)==list(half) and all(same[k].equal(v) for k,v in half.items())
    full = resnet18(7).cpu().state_dict()
    assert list(half)==list(full)
    for head in (7, 5):
        with pytest.raises(ValueError, match="not ResNet-18's: bn1.weight"):
            resnet18(head, full | {'conv1.weight': half['conv1.weight']})

def test_seed():
    "A seed makes a network, at any width, and leaves the generator alone"
    torch.manual_seed(0)
    a,b,c = (resnet18(5, seed=s, width=16).state_dict() for s in (0, 0, 1))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert after.equal(torch.rand(3))
    assert all(a[k].equal(b[k]) for k in a) and not a['fc.weight'].equal(c['fc.weight'])

@pytest.mark.parametrize('seed,width', [(0,64), (1,64), (2,64), (0,32), (1,16), (3,16)])
def test_folded_network(seed, width):
    "BatchNorm folded, kernels as matrices: the same logits as torchvision's network"
    g = torch.Generator().manual_seed(seed)
    net = resnet18(7, seed=seed, width=width).eval()
    sd = {k: (torch.rand(v.shape, generator=g)+.5 if k.endswith(('running_var','.weight')) and v.dim()==1
        else .1*torch.randn(v.shape, generator=g) if v.dim()==1 else v)
        for k,v in net.state_dict().items()}
    net.load_state_dict(sd)
    x = torch.randint(0, 256, (20, 1, 32, 32), generator=g, dtype=torch.uint8)
    with torch.inference_mode(): want = net(prepare(x)).cpu()
    got = Folded(sd, dict(a=(sd['fc.weight'], sd['fc.bias'])), fast=False)(x)['a']
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4*want.abs().max().item())
    rough = Folded(sd, dict(a=(sd['fc.weight'], sd['fc.bias'])))(x)['a']
    assert (rough-want).abs().max() < .05*want.abs().max()

def test_several_heads_and_networks():
    "Two heads share a body, two networks their first stages; logits are those of each alone"
    one = {k: v.cpu() for k,v in resnet18(5, width=16).eval().state_dict().items()}
    two = one | {'layer4.0.conv1.weight': one['layer4.0.conv1.weight'].flip(0)}
    heads = dict(a=(one['fc.weight'], one['fc.bias']), b=(one['fc.weight'][:3]*2, one['fc.bias'][:3]))
    nets = [Folded(one, heads, False)]
    nets.append(Folded(two, dict(b=heads['b']), False, nets))
    assert sum(a is b for a,b in zip(*(o.stages for o in nets)))==8 # all but layer4.0
    x = torch.randint(0, 256, (30, 1, 32, 32), dtype=torch.uint8)
    both = logits_together(nets, x)
    assert [list(o) for o in both]==[['a','b'], ['b']] and both[0]['b'].shape==(30, 3)
    for sd,got in zip((one, two), both):
        for k,(w,b) in heads.items():
            if k not in got: continue
            net = resnet18(len(w), {**sd, 'fc.weight': w, 'fc.bias': b}).eval()
            with torch.inference_mode(): near(got[k], net(prepare(x)).cpu(), 1e-4)

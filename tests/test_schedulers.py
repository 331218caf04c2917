"""The drop-in schedulers: noise, corrections, bad input, real pipelines, and what diffusers asks of a scheduler."""

import copy
import inspect
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

from gmkernels import ops, schedulers  # noqa: E402
from gmkernels.ops import diffusion_coefficients as co  # noqa: E402
from scheduler_cases import model, relative, sample  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of diffusers
NAMES = schedulers.__all__
NOISY = {"DDPMScheduler": {}, "EulerAncestralDiscreteScheduler": {}, "LCMScheduler": {},
         "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
         "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++"},
         "EDMDPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
         "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True}}  # fmt: skip
STEPS = {"LCMScheduler": 4}
# have a schedule from the start
ALWAYS_READY = ("DDPMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
                "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")  # fmt: skip
DEFAULTS = {"PNDMScheduler": {"skip_prk_steps": True}}  # its Runge-Kutta steps are diffusers' own


def make(name, steps=None, **config):
    s = getattr(schedulers, name)(**DEFAULTS.get(name, {}) | config)
    s.set_timesteps(steps or STEPS.get(name, 10))
    s.is_scale_input_called = True
    return s


def pair(seed=0, shape=(2, 3, 8, 8), dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype)


# what diffusers asks of a scheduler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_is_the_scheduler_of_diffusers(name, tmp_path):
    ours, theirs = getattr(schedulers, name), getattr(diffusers, name)
    assert issubclass(ours, theirs) and ours.__name__ == name and ours.__doc__
    s = ours()
    assert dict(s.config) == dict(theirs().config)
    for method in ("step", "set_timesteps", "scale_model_input", "add_noise"):
        if hasattr(theirs, method):
            want = list(inspect.signature(getattr(theirs, method)).parameters)
            got = list(inspect.signature(getattr(ours, method)).parameters)
            assert got == want or method == "scale_model_input"
        else:
            assert not hasattr(ours, method)
    s = ours.from_config(theirs(num_train_timesteps=500).config, corrected=True)
    assert s.config.num_train_timesteps == 500 and s.corrected
    s.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path)
    assert again.corrected and again.noise == "auto" and again.config.num_train_timesteps == 500
    back = theirs.from_config(ours().config)
    assert dict(back.config) == dict(theirs().config)
    copy.deepcopy(make(name)), pickle.dumps(make(name))


def test_outputs_are_diffusers_own():
    x, m = pair()
    s = make("DDIMScheduler")
    out = s.step(m, s.timesteps[0], x)
    want = type(out)(prev_sample=out.prev_sample, pred_original_sample=out.pred_original_sample)
    theirs = diffusers.DDIMScheduler()
    theirs.set_timesteps(10)
    assert type(out) is type(theirs.step(m, s.timesteps[0], x))
    assert list(out) == list(want) and vars(out) == vars(want)
    assert out[0] is out.prev_sample is out["prev_sample"] and out.to_tuple()[1] is out.pred_original_sample
    assert torch.equal(pickle.loads(pickle.dumps(out)).prev_sample, out.prev_sample)
    assert isinstance(s.step(m, s.timesteps[1], x, return_dict=False), tuple)


def test_loads_on_first_use_and_names_the_extra():
    code = ("import sys, gmkernels; assert 'diffusers' not in sys.modules; sys.modules['diffusers'] = None\n"
            "try: gmkernels.schedulers\n"
            "except ImportError as e: assert 'gmkernels[diffusers]' in str(e); print('named')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "named", done.stderr


class NoSync(TorchDispatchMode):
    """What would wait for a GPU, were the tensors on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_step_reads_nothing_back(name):
    s = make(name, **NOISY.get(name, {}))
    x, m = pair()
    extra = {"generator": torch.Generator().manual_seed(0)} if name in NOISY else {}
    for _ in range(2):
        times = list(s.timesteps)
        with NoSync():
            for t in times:
                x = s.step(m, t, x, **extra).prev_sample
        s.set_timesteps(s.num_inference_steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_step_does_not_synchronise(name):
    s = getattr(schedulers, name)(**NOISY.get(name, {}))
    s.set_timesteps(STEPS.get(name, 10), device="cuda")
    s.is_scale_input_called = True
    x, m = (t.cuda() for t in pair())
    want, times = x.cpu(), list(s.timesteps)
    cpu = make(name, **NOISY.get(name, {}))
    torch.manual_seed(0)
    ops.diffusion_step(x, m, torch.zeros(8, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in times:
            x = s.step(m, t, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.manual_seed(0)
    for t in cpu.timesteps:
        want = cpu.step(m.cpu(), t, want).prev_sample
    assert relative(x.cpu(), want) < 1e-5


# noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NOISY))
def test_philox_noise_is_seeded_by_torch_and_numbered_by_the_step(name):
    config = NOISY[name]
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(sample(make(name, **config), STEPS.get(name, 6), generator=False)[0])
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    s, (x, m) = make(name, **config), pair()
    outs = []
    for index in (0, 1, 1):
        s._step_index = index
        s.model_outputs, s.lower_order_nums = [None] * 2, 0
        t = s.timesteps[index]
        outs.append(s.step(m, t, x).prev_sample)
        if index == 0:
            seed = s._plan.noise.seed
    assert s._plan.noise.seed != seed  # the second step at one index is another run: no number twice
    assert not torch.equal(outs[1], outs[2])


def test_ddpm_noise_is_the_public_stream():
    s, (x, m) = make("DDPMScheduler"), pair()
    quiet = make("DDPMScheduler")
    for i, t in enumerate(s.timesteps[:3]):
        got = s.step(m, t, x).prev_sample
        z = ops.philox_normal(x.shape, s._plan.noise.seed, step=i, stream=2)
        row = quiet._table(quiet._ready()).row(i, x)
        want = ops.diffusion_step(x, m, row, clip=1.0, noise=z)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", sorted(NOISY))
def test_torch_noise_is_diffusers_without_a_generator(name):
    results = []
    for module, extra in ((schedulers, {"noise": "torch"}), (diffusers, {})):
        torch.manual_seed(3)
        results.append(sample(getattr(module, name)(**NOISY[name], **extra), STEPS.get(name, 6), generator=False)[0])
    assert relative(*results) < 2e-6


def test_a_list_of_generators():
    def run(scheduler, seeds):
        g = [torch.Generator().manual_seed(i) for i in seeds]
        scheduler.set_timesteps(6)
        x = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in seeds])
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=g).prev_sample
        return x

    assert relative(run(schedulers.DDPMScheduler(), (1, 2)), run(diffusers.DDPMScheduler(), (1, 2))) < 2e-6
    philox = schedulers.DDPMScheduler(noise="philox")
    both = run(philox, (1, 2))
    assert torch.equal(both[1:], run(philox, (2,)))  # a seed for each sample: it does not depend on the batch
    assert torch.equal(both[1:], run(philox, (2, 3))[:1])
    single = [sample(schedulers.DDPMScheduler(noise="philox"), 6, seed=5)[0] for _ in range(2)]
    assert torch.equal(*single) and not torch.equal(single[0], sample(schedulers.DDPMScheduler(), 6, seed=5)[0])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_variance_noise(name):
    config = NOISY.get(name, {})
    extra = {"eta": 0.5} if name == "DDIMScheduler" else {}
    x, m = pair()
    results = []
    for module in (schedulers, diffusers):
        s = getattr(module, name)(**config)
        s.set_timesteps(6)
        results.append(s.step(m, s.timesteps[0], x, variance_noise=torch.sin(x), **extra).prev_sample)
    assert relative(*results) < 2e-6


# corrections ---------------------------------------------------------------------------------------------------------


def test_corrected_ddim_steps_to_the_next_time_of_the_schedule():
    """diffusers steps by num_train_timesteps // n whatever the spacing (issue #11347)."""
    x, m = pair()
    config = {"timestep_spacing": "linspace", "clip_sample": False}
    wrong, right = (make("DDIMScheduler", 7, corrected=c, **config) for c in (False, True))
    times = right.timesteps.tolist()
    for t, after in zip(times, [*times[1:], None], strict=True):
        a, a_next = (1.0 if i is None else right.alphas_cumprod[i].item() for i in (t, after))
        want = ops.diffusion_step(x.double(), m.double(), torch.tensor(co.ddim(a, a_next), dtype=torch.float64))
        assert relative(right.step(m, t, x).prev_sample, want) < 5e-7
    assert relative(wrong.step(m, times[0], x).prev_sample, right.step(m, times[0], x).prev_sample) > 1e-3


def test_corrected_add_noise_in_bfloat16_adds_noise_at_the_first_time():
    """diffusers rounds alphas_cumprod to bfloat16, where 0.9999 is 1 (pull request #9004)."""
    x, z = torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16), pair(dtype=torch.bfloat16)[1][:1]
    t = torch.tensor([0])
    for name in ("DDPMScheduler", "DDIMScheduler"):
        assert not make(name).add_noise(x, z, t).any()
        right = make(name, corrected=True)
        assert relative(right.add_noise(x, z, t), z.double() * (1 - right.alphas_cumprod[0].double()).sqrt()) < 4e-3


def test_corrected_ddpm_has_float64_coefficients_and_a_variance_for_fixed_large_log():
    x, m = pair()
    s = make("DDPMScheduler", 1000, corrected=True, clip_sample=False, variance_type="fixed_large")
    log = make("DDPMScheduler", 1000, corrected=True, clip_sample=False, variance_type="fixed_large_log")
    for i in (0, 500, 990, 999):
        t = 999 - i
        a, a_next = s.alphas_cumprod[t].item(), s.alphas_cumprod[t - 1].item() if t else 1.0
        want = torch.tensor(co.ddpm(a, a_next, variance_type="fixed_large"), dtype=torch.float64)
        torch.testing.assert_close(s._table(s._ready()).rows[i], want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(log._table(log._ready()).rows[i], want, rtol=1e-9, atol=1e-12)
    off = make("DDPMScheduler", 1000, variance_type="fixed_large_log")
    assert off.step(m, 500, x, generator=torch.Generator()).prev_sample.isnan().all()  # as diffusers


def test_corrected_unipc_bh1_ends_in_numbers():
    results = [sample(schedulers.UniPCMultistepScheduler(solver_type="bh1", corrected=c), 8)[0] for c in (False, True)]
    assert results[0].isnan().all() and results[1].isfinite().all()  # as diffusers; not so


# types and values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(name, dtype):
    """One step against the same step in float64: a unit in the last place."""
    s, wide = make(name), make(name)
    x, m = pair(dtype=dtype)
    t = s.timesteps[2]
    outs = []
    for scheduler, real in ((s, dtype), (wide, torch.float64)):
        extra = {"generator": torch.Generator().manual_seed(0)} if name in NOISY else {}
        if extra:  # the same numbers
            scheduler.noise, extra = "philox", {"generator": torch.Generator().manual_seed(0)}
        outs.append(scheduler.step(m.to(real), t, x.to(real), **extra).prev_sample)
    got, want = outs
    assert got.dtype is dtype
    size = want.abs().max() if name == "LCMScheduler" else want.abs().clamp(min=1e-2)  # a sum of what was rounded
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * size).all()


def test_mixed_types_are_those_of_diffusers():
    x, m = pair()
    for name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
                 "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"):
        results = []
        for module in (schedulers, diffusers):
            s = getattr(module, name)()
            s.set_timesteps(5)
            results.append(s.step(m.bfloat16(), s.timesteps[-1], x, **({"generator": torch.Generator().manual_seed(0)}
                                  if name in NOISY else {})).prev_sample)
        assert results[0].dtype is results[1].dtype and relative(*results) < 1e-2


def test_gradients_through_three_steps_of_order_3():
    """UniPC corrects the sample it was given, in place only where nobody differentiates."""
    x, m = pair()
    results = []
    for module in (schedulers, diffusers):
        s = module.UniPCMultistepScheduler(solver_order=3)
        s.set_timesteps(8)
        leaf, y = x.clone().requires_grad_(), x
        for i, t in enumerate(s.timesteps[:5]):
            y = s.step(torch.sin(leaf + i) * m, t, y if i else leaf).prev_sample
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) < 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_diffusers_own(name):
    grads = []
    for module in (schedulers, diffusers):
        s = getattr(module, name)()
        s.set_timesteps(STEPS.get(name, 10))
        s.is_scale_input_called = True
        x, m = (t.requires_grad_() for t in pair())
        extra = {"generator": torch.Generator().manual_seed(0)} if name in NOISY else {}
        s.step(m, s.timesteps[1], x, **extra).prev_sample.square().sum().backward()
        grads += [x.grad, m.grad]
    for got, want in zip(grads[:2], grads[2:], strict=True):
        if got is None:
            got = torch.zeros_like(x)
        assert relative(got, torch.zeros_like(x) if want is None else want) < 5e-6 or not want.any()


@pytest.mark.parametrize("name", NAMES)
def test_nan_from_the_model_is_not_hidden(name):
    s, (x, m) = make(name), pair()
    m[0, 0, 0, 0] = math.nan
    out = s.step(m, s.timesteps[0], x).prev_sample
    assert out[0, 0, 0, 0].isnan() and out[1].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name):
    s, (x, m) = make(name), pair()
    t = s.timesteps[0]
    with pytest.raises(ValueError, match="model_output must have"):
        s.step(m[:, :2], t, x)
    with pytest.raises(ValueError, match="model_output must have the shape of sample"):
        s.step(m[:1], t, x)
    with pytest.raises(TypeError, match="sample must be a floating tensor"):
        s.step(m, t, x.long())
    with pytest.raises(TypeError, match="model_output must be a floating tensor"):
        s.step(m.long(), t, x)
    with pytest.raises((TypeError, AttributeError)):
        s.step(m.numpy(), t, x)
    with pytest.raises(ValueError, match="at least 1"):
        s.set_timesteps(0)
    with pytest.raises(TypeError, match="corrected must be a bool"):
        getattr(schedulers, name)(corrected=1)
    with pytest.raises(ValueError, match="noise must be one of"):
        getattr(schedulers, name)(noise="gauss")
    fresh = getattr(schedulers, name)()
    if name not in ALWAYS_READY:
        with pytest.raises(ValueError, match="call set_timesteps before step"):
            fresh.step(m, t, x)
    if hasattr(s, "set_begin_index"):
        s._step_index = len(s.timesteps)
        with pytest.raises(IndexError, match="all are done"):
            s.step(m, t, x)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "LCMScheduler"])
def test_more_steps_than_trained(name):
    with pytest.raises(ValueError):
        make(name, 1001)


def test_bad_times_and_choices():
    x, m = pair()
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 1"):
        make("DDPMScheduler").step(m, 1, x)
    with pytest.raises(ValueError, match="timestep must be an integer below 1000, got 1000"):
        make("DDIMScheduler").step(m, 1000, x)
    for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
                 "EDMEulerScheduler", "FlowMatchHeunDiscreteScheduler"):
        with pytest.raises(ValueError, match="got an integer"):
            make(name).step(m, 1, x)
        with pytest.raises(IndexError, match="timestep must be one of"):
            make(name).step(m, 1.5, x)
    for name in NAMES:
        if "prediction_type" in schedulers.__dict__[name]().config:
            with pytest.raises(ValueError, match="prediction_type|[Pp]rediction type"):
                make(name, prediction_type="noise").step(m, 1.0, x)
    with pytest.raises(ValueError, match="variance_type must be"):
        make("DDPMScheduler", variance_type="small")
    with pytest.raises(ValueError, match="model_output must have 6 channels"):
        make("DDPMScheduler", variance_type="learned").step(m, 900, x)
    with pytest.raises(ValueError, match="only one of generator and variance_noise"):
        s = make("DDIMScheduler")
        s.step(m, s.timesteps[0], x, eta=1.0, generator=torch.Generator(), variance_noise=x)


def test_a_schedule_that_was_replaced_is_seen():
    """`sigmas` and `timesteps` are public: some pipelines set them."""
    x, m = pair()
    for change in ("replace", "in place"):
        results = []
        for module in (schedulers, diffusers):
            s = module.EulerDiscreteScheduler()
            s.set_timesteps(5)
            s.is_scale_input_called = True
            s.step(m, s.timesteps[0], x)
            if change == "replace":
                s.sigmas = s.sigmas * 0.5
            else:
                s.sigmas.mul_(0.5)
            results.append(s.step(m, s.timesteps[1], x).prev_sample)
        assert relative(*results) < 2e-6


def test_timesteps_that_are_not_contiguous():
    """The address of a view of them is not its place in the schedule."""
    x, m = pair()
    results = []
    for module in (schedulers, diffusers):
        s = module.EulerDiscreteScheduler()
        s.set_timesteps(6)
        s.is_scale_input_called = True
        s.timesteps = s.timesteps.repeat_interleave(2)[::2]
        assert not s.timesteps.is_contiguous()
        results.append(s.step(m, s.timesteps[2], x).prev_sample)
    assert relative(*results) < 2e-6


def test_zero_snr_and_sigma_zero_are_diffusers():
    """Rows without finite coefficients are steps of diffusers itself, between ours."""
    x, m = pair()
    for name, config in (("DDPMScheduler", {}), ("DDIMScheduler", {"timestep_spacing": "trailing"})):
        results = []
        for module in (schedulers, diffusers):
            s = getattr(module, name)(rescale_betas_zero_snr=True, **config)
            s.set_timesteps(1000 if name == "DDPMScheduler" else 10)
            extra = {"generator": torch.Generator().manual_seed(0)} if name in NOISY else {}
            results.append(s.step(m, 999, x, **extra).prev_sample)
        assert relative(*results) < 2e-6
    results = []
    for module in (schedulers, diffusers):
        s = module.EulerDiscreteScheduler()
        s.set_timesteps(sigmas=[3.0, 1.0, 0.0, 0.0])
        s.is_scale_input_called, y = True, x
        for t in s.timesteps:
            y = s.step(m, t, y).prev_sample
        results.append(y)
    assert relative(*results) < 2e-6


# pipelines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=8,
                                 block_out_channels=(8, 16), down_block_types=("DownBlock2D", "DownBlock2D"),
                                 up_block_types=("UpBlock2D", "UpBlock2D")).eval()  # fmt: skip


def generate(pipe, scheduler, **arguments):
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler  # DDIMPipeline would make a DDIMScheduler of diffusers of the one it is given
    return torch.from_numpy(pipe(batch_size=2, num_inference_steps=8, output_type="np", **arguments).images)


@pytest.mark.parametrize("kind, arguments", [("DDPM", {}), ("DDIM", {}), ("DDIM", {"eta": 0.7}),
                                             ("DDIM", {"use_clipped_model_output": True})])
def test_pipelines(unet, kind, arguments):
    name = kind + "Scheduler"
    pipe = getattr(diffusers, kind + "Pipeline")(unet, getattr(diffusers, name)())
    images = [generate(pipe, getattr(module, name)(), generator=torch.Generator().manual_seed(1), **arguments)
              for module in (schedulers, diffusers)]  # fmt: skip
    assert relative(*images) < 2e-4  # the first step of an untrained model multiplies a difference by 160
    assert images[0].std() > 0.01
    torch.manual_seed(0)
    free = generate(pipe, getattr(schedulers, name)(), **arguments)
    assert free.isfinite().all() and not torch.equal(free, images[0])


def test_randn_tensor_is_the_noise_of_a_generator():
    s, (x, m) = make("EulerAncestralDiscreteScheduler"), pair()
    g = torch.Generator().manual_seed(4)
    got = s.step(m, s.timesteps[0], x, generator=g).prev_sample
    z = randn_tensor(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    assert torch.equal(got, ops.diffusion_step(x, m, s._table(s._ready()).row(0, x), noise=z))


def test_a_schedule_made_for_inference_has_gradients_and_the_default_device_does_not_matter():
    x, m = pair()
    with torch.inference_mode():
        s = make("DPMSolverMultistepScheduler")
    m.requires_grad_()
    s.step(m, s.timesteps[0].item(), x).prev_sample.sum().backward()
    assert m.grad.abs().sum() > 0
    made = {name: make(name) for name in NAMES}
    with torch.device("meta"):
        for name, s in made.items():
            s._plan = None
            extra = {"generator": torch.Generator("cpu")} if name in NOISY else {}
            assert s.step(m.detach(), s.timesteps[0], x, **extra).prev_sample.isfinite().all()


def test_a_number_of_steps_that_was_set_by_hand_is_seen():
    x, m = pair()
    results = []
    for module in (schedulers, diffusers):
        s = module.DDIMScheduler()
        s.set_timesteps(10)
        s.step(m, 900, x)
        s.num_inference_steps = 20
        results.append(s.step(m, 800, x).prev_sample)
    assert relative(*results) < 2e-6

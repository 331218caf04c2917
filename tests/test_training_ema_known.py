"""ops.ema_update_: lists that come again are not checked again, and still nothing that changed goes unseen."""

import re
import weakref

import pytest
import torch

from gmkernels import ops
from test_training_ema import BF16, F16, F64, Labelled, oracle, tensors


def known(*lists):
    """Steps until no tensor of these lists is asked again what it is."""
    for _ in range(3):
        for e, v in lists:
            step(e, v)
    assert all(weakref.getweakrefcount(t) == 1 for e, v in lists for t in (*e, *v))


def step(e, v):
    want = oracle(e, v, 0.5)
    ops.ema_update_(e, v, 0.5)
    for got, w in zip(e, want, strict=True):
        torch.testing.assert_close(got.detach().double().resolve_neg(), w.detach().resolve_neg(), rtol=1e-3, atol=1e-3)


def test_known_lists_that_change():
    e, v = tensors([(4,)] * 3), tensors([(4,)] * 3, seed=3)
    known((e, v))
    with pytest.raises(ValueError, match="share memory"):
        step([e[0], e[0], e[2]], v)
    step(e[::-1], v)
    step(e, v[::-1])
    step(e[:2], v[:2])
    known((e, v))
    with pytest.raises(ValueError, match=re.escape("values[1] and ema[0] share memory")):
        step(e, [v[0], e[0], v[2]])
    known((e, v))


def test_a_list_that_is_good_only_in_its_order():
    e = tensors([(4,)] * 2)
    v = [e[0], tensors([(4,)], seed=3)[0]]
    known((e, v))
    with pytest.raises(ValueError, match=re.escape("values[0] and ema[1] share memory")):
        step(e[::-1], v)


def test_a_bad_list_is_not_known_and_a_good_one_is():
    e, v = tensors([(4,)] * 2), tensors([(4,)] * 2, seed=3)
    for _ in range(4):
        with pytest.raises(ValueError, match="share memory"):
            step([e[0], e[0]], v)
    known((e, v))


@pytest.mark.parametrize("wrap", [torch.Tensor.detach, torch.nn.Parameter])
def test_storage_swapped_under_a_known_tensor(wrap):
    e, v = map(wrap, tensors([(4,)] * 3)), map(wrap, tensors([(4,)] * 3, seed=3))
    e, v = list(e), list(v)
    known((e, v))
    before = e[1].data, e[1].detach().clone()
    e[1].data, v[2].data = torch.full((4,), 8.0), torch.full((4,), 9.0)
    known((e, v))
    assert torch.equal(*before)
    e[2].data = torch.ones(6)
    with pytest.raises(ValueError, match=re.escape("values[2] must have the shape of ema[2]")):
        ops.ema_update_(e, v, 0.5)
    e[2].data = torch.ones(2, 2)  # of as many elements at a place that was not known: the shape is still compared
    with pytest.raises(ValueError, match=re.escape("values[2] must have the shape of ema[2]")):
        ops.ema_update_(e, v, 0.5)
    e[2].data = v[2].data.clone()
    known((e, v))
    e[2].data = e[2].data.view(2, 2)  # and at the same place
    with pytest.raises(ValueError, match=re.escape("values[2] must have the shape of ema[2]")):
        ops.ema_update_(e, v, 0.5)


def test_storage_swapped_so_that_tensors_overlap():
    whole = torch.arange(16.0)
    e, v = [whole[:4], whole[4:8], whole[8:12]], tensors([(4,)] * 3, seed=3)
    for swap, data, text in ((e, whole[4:8], "ema[1] and ema[2]"), (e, whole[1:5], "ema[0] and ema[2]"),
                             (v, whole[2:6], "values[2] and ema[0]")):
        known((e, v))
        good, swap[2].data = swap[2].data, data
        before = whole.clone()
        with pytest.raises(ValueError, match=re.escape(text + " share memory")):
            ops.ema_update_(e, v, 0.5)
        assert torch.equal(whole, before)
        swap[2].data = good


def test_a_known_place_that_grows_into_another():
    """The same addresses: only the count, or only a dtype, is another."""
    for kind in ("count", "dtypes", "value's dtype", "average's dtype"):
        whole, more = torch.arange(16.0), torch.arange(16.0)
        e, v = [whole[4:8], whole[8:12]], [more[4:8], more[8:12]]
        text = "ema[0] and ema[1]"
        if kind == "count":
            swapped = (e[0], whole[4:10]), (v[0], more[4:10])
        elif kind == "dtypes":
            swapped = (e[0], whole.view(F64)[2:6]), (v[0], more.view(F64)[2:6])
        elif kind == "average's dtype":  # a value that is its own average, until that is the longer one
            e[0], v[0], text = whole.view(BF16)[8:12], whole.view(BF16)[8:12], "values[0] and ema[0]"
            swapped = ((e[0], whole[4:8]),)
        else:
            v[0], text = whole.view(BF16)[4:8], "values[0] and ema[0]"
            swapped = ((v[0], whole[2:6]),)
        known((e, v))
        for t, data in swapped:
            assert t.data_ptr() == data.data_ptr()
            t.data = data
        with pytest.raises(ValueError, match=re.escape(text + " share memory")):
            ops.ema_update_(e, v, 0.5)


@pytest.mark.parametrize("of_ema", [False, True])
@pytest.mark.parametrize("odd", [False, True], ids=["even place", "odd place"])
def test_a_negated_tensor_with_the_id_of_a_known_one(of_ema, odd):
    z = torch.complex(torch.tensor([3.0]), torch.tensor([5.0]))
    source = z.conj().imag
    pair = [torch.ones(1), torch.ones(1)]
    pair[of_ema] = z.imag if odd else z.real
    before = id(pair[of_ema]), pair[of_ema].data_ptr()
    known((pair[1:], pair[:1]))
    pair[of_ema] = None
    views = [source.as_strided((1,), (1,), int(odd)) for _ in range(50)]
    pair[of_ema] = next((t for t in views if id(t) == before[0]), None)
    if pair[of_ema] is None:
        pytest.skip("the id was not used again")
    assert pair[of_ema].is_neg() and pair[of_ema].is_contiguous() and pair[of_ema].data_ptr() == before[1]
    step(pair[1:], pair[:1])


def test_a_known_tensor_that_is_negated_in_its_place():
    z = torch.complex(torch.tensor([3.0]), torch.tensor([5.0]))
    for e, v in (([z.imag], tensors([(1,)])), (tensors([(1,)]), [z.imag])):
        known((e, v))
        t = e[0] if e[0].data_ptr() == z.imag.data_ptr() else v[0]
        t.data = z.conj().imag
        assert t.is_neg() and t.data_ptr() == z.imag.data_ptr()
        step(e, v)


def test_other_objects_of_known_memory():
    e, v = tensors([(4,)] * 3), tensors([(4,)] * 3, seed=3)
    known((e, v))
    for _ in range(20):
        step([t.detach() for t in e], [t.view(4) for t in v])
    for _ in range(20):
        step([t.detach().as_subclass(Labelled) for t in e], v)
    for _ in range(60):
        step(e, v)
    known((e, v))


def test_known_tensors_of_another_dtype():
    e, v = tensors([(4,)] * 2), tensors([(4,)] * 2, seed=3)
    for t, dtype in ((v[0], BF16), (v[1], torch.int32), (e[1], F16), (e[0], torch.int32)):
        known((e, v))
        good, t.data = t.data, t.data.view(dtype)[:4]
        t.copy_(torch.arange(4))
        if t is e[0]:
            ops.ema_update_(e, v, 0.5)
            assert e[0].tolist() == [int(x) for x in v[0]]
        else:
            step(e, v)
        t.data = good.fill_(1)


def test_known_tensors_that_begin_to_want_gradients():
    e, v = tensors([(4,)] * 2), tensors([(4,)] * 2, seed=3)
    known((e, v))
    e[0].requires_grad_()
    v[1].requires_grad_()
    version = e[0]._version
    known((e, v))
    assert e[0].grad_fn is None and e[0].requires_grad and e[0]._version == version + 3


@pytest.mark.parametrize("number", [2, 4, 5, 9])
def test_lists_by_turns(number):
    lists = [(tensors([(4,)] * 2, seed=10 * i), tensors([(4,)] * 2, seed=10 * i + 5)) for i in range(number)]
    for turn in range(6):
        for i, (e, v) in enumerate(lists):
            step(e, v)
            if turn == i % 5:
                e[0].data = torch.full((4,), float(i))
    if number <= 4:
        known(*lists)


def test_one_value_for_two_averages_and_an_empty_tensor_twice():
    e, v, empty = tensors([(4,)] * 2), tensors([(4,)], seed=3)[0], torch.zeros(0)
    for _ in range(4):
        step([*e, empty, empty], [v, v, empty, empty])


def test_known_tensors_die():
    e, v = tensors([(4,)] * 3), tensors([(4,)] * 3, seed=3)
    known((e, v))
    seen = weakref.ref(e[1]), weakref.ref(v[2])
    del e[1], v[2]
    assert seen[0]() is None and seen[1]() is None
    step(e, v)
    seen = weakref.ref(e[0])
    del e, v
    assert seen() is None


def test_modules_that_swap_their_parameters():
    """torch.utils.swap_tensors refuses tensors with weak references."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, average = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        for _ in range(4):
            ops.ema_update_(average.parameters(), model.parameters(), 0.5)
        average.load_state_dict(model.state_dict())
        average.double()
        assert average.weight.dtype == F64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

"""Distillation: KL to a teacher from marginals over codes, against dense float64 softmaxes of both."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from ksub_ds import CodeTable, compress, plain_codes, positional_codes, replace_embeddings
from ksub_ds.common.errors import UserError
from ksub_ds.corpus.masking import masked_positions
from ksub_ds.model import distillation
from ksub_ds.model.distillation import SoftTargets, Teacher

SIZE = {"vocab_size": 130, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def plain(family="bert", head=AutoModelForMaskedLM, **more):
    torch.manual_seed(0)
    extra = {"distilbert": {"dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 130}}
    if family == "modernbert":
        more |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    model = head.from_config(AutoConfig.for_model(family, **extra.get(family, SIZE) | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 120, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask, torch.where((torch.rand(ids.shape, generator=generator) < 0.5) & (mask == 1), ids, -100)


def places(labels, count=None):
    """Where the labels are and what they are, filled up to `count` by places that do not count."""
    positions, targets = masked_positions(labels.numpy(), count)
    return torch.from_numpy(positions), torch.from_numpy(targets)


def expected_loss(student, teacher_logits, ids, mask, labels, weight):
    """(1 - w) CE + w KL, summed, from dense logits in float64."""
    chosen = labels != -100
    ours = student(ids, attention_mask=mask).logits[chosen].double().log_softmax(1)
    theirs = teacher_logits[chosen].double().log_softmax(1)
    divergence = (theirs.exp() * (theirs - ours)).sum()
    return (1 - weight) * F.nll_loss(ours, labels[chosen], reduction="sum") + weight * divergence


@pytest.mark.parametrize(
    ("family", "dedicated"),
    [*((family, 0) for family in ("bert", "roberta", "electra", "distilbert", "modernbert")), ("bert", 30)],
)
def test_the_loss_and_its_gradients_are_those_of_dense_softmaxes(family, dedicated, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "TEACHER_LOGITS", {"cpu": 4 * 120})  # several blocks
    source = plain(family)
    source.save_pretrained(tmp_path)
    ids, mask, labels = batch()
    logits = source(ids, attention_mask=mask).logits[..., :120].detach()
    table = positional_codes(120, 3)  # the teacher has ten more rows than the tokenizer has tokens
    table = CodeTable(table.codes, table.table_sizes, dedicated=range(0, 4 * dedicated, 4))
    student = compress(source, table).eval()
    if dedicated:
        torch.nn.init.normal_(student.get_input_embeddings().dedicated_rows)
    soft = Teacher(tmp_path, table).targets(ids, *places(labels), mask)
    assert soft.marginals.shape == ((labels != -100).sum(), 15 + dedicated) and soft.totals.shape == (120,)
    torch.testing.assert_close(soft.marginals[:, :15].sum(1), torch.full((len(soft.marginals),), 3.0))
    for weight in (0.3, 1.0):
        loss = student(
            ids, attention_mask=mask, labels=labels, soft_targets=soft, soft_weight=weight, loss_reduction="sum"
        ).loss
        wanted = expected_loss(student, logits, ids, mask, labels, weight)
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-4)
        parameters = list(student.parameters())
        ours = torch.autograd.grad(loss, parameters, allow_unused=True)
        theirs = torch.autograd.grad(wanted, parameters, allow_unused=True)
        for first, second in zip(ours, theirs, strict=True):
            if second is not None:
                torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    mean = student(ids, attention_mask=mask, labels=labels, soft_targets=soft, soft_weight=1.0).loss
    torch.testing.assert_close(mean * (labels != -100).sum(), loss)


def test_a_copy_of_the_teacher_has_nothing_to_learn(tmp_path):
    source = plain()
    student = compress(source, plain_codes(130)).eval()
    student.save_pretrained(tmp_path)  # one of ours as the teacher
    ids, mask, labels = batch()
    soft = Teacher(tmp_path, student.code_table()).targets(ids, *places(labels), mask)
    loss = student(ids, attention_mask=mask, labels=labels, soft_targets=soft, soft_weight=1.0).loss
    assert abs(loss.item()) < 1e-4
    loss.backward()
    assert max(each.grad.abs().max() for each in student.parameters() if each.grad is not None) < 1e-4


@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32])
def test_in_bf16_the_divergence_is_as_exact_as_the_loss(buffers, tmp_path):
    """log Z is float32 or better there; the rest of the divergence must be so too, or it falls below 0."""
    source = plain()
    with torch.no_grad():
        source.get_input_embeddings().weight *= 8
    source.save_pretrained(tmp_path)
    ids, mask, labels = batch()
    table = positional_codes(130, 3)
    student = compress(source, table, mixing="linear").eval().bfloat16()
    layer = student.get_input_embeddings()
    layer.mixing.data = layer.mixing.to(buffers)  # as ZeRO 1 leaves it, and as ZeRO 3 does
    soft = Teacher(tmp_path, table).targets(ids, *places(labels), mask)
    arguments = {"attention_mask": mask, "labels": labels, "loss_reduction": "sum"}
    loss = student(ids, **arguments, soft_targets=soft, soft_weight=1.0).loss
    states = student._decoder_input_at(ids, places(labels)[0], mask)  # the student's own, in bf16
    logits = layer.to_tables(states).double().split(layer.widths, dim=1)
    logits = sum(
        (part @ rows.double().t())[:, layer.codes[:, k]]
        for k, (part, rows) in enumerate(zip(logits, layer.tables, strict=True))
    )
    ours = (logits + student.decoder_bias.double()).log_softmax(1)
    with torch.no_grad():
        theirs = source(ids, attention_mask=mask).logits[labels != -100].double().log_softmax(1)
    torch.testing.assert_close(loss.double(), (theirs.exp() * (theirs - ours)).sum(), rtol=1e-4, atol=1e-3)


def test_under_autocast_a_model_diverges_from_itself_by_nothing():
    """`--precision bf16` is autocast around the whole forward pass, the loss included."""
    student = compress(plain(), positional_codes(130, 3))
    layer, bias = student.get_input_embeddings(), student.decoder_bias
    hidden, labels = torch.randn(40, 24), torch.randint(130, (40,))
    logits = layer.logits(hidden, bias).detach().double()
    probs, log_probs = logits.softmax(1), logits.log_softmax(1)
    marginals = [torch.zeros(40, 6).double().index_add_(1, codes, probs) for codes in layer.codes.T]
    soft = SoftTargets(torch.cat(marginals, dim=1).float(), probs.sum(0).float(), -(probs * log_probs).sum().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(student._loss(hidden, labels, "mean", soft, 1.0)) < 1e-4
        rounded = student._loss(hidden.bfloat16(), labels, "mean", soft, 1.0)
    torch.testing.assert_close(rounded, student._loss(hidden.bfloat16().float(), labels, "mean", soft, 1.0))


def test_teachers_that_will_not_do(tmp_path):
    plain(head=AutoModel).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="is a BertModel, which predicts no masked tokens"):
        Teacher(tmp_path / "bare", positional_codes(120, 3))
    plain(tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    with pytest.raises(UserError, match="decoder is not tied"):
        Teacher(tmp_path / "untied", positional_codes(120, 3))
    plain().save_pretrained(tmp_path / "small")
    plain().bfloat16().save_pretrained(tmp_path / "bf16")
    assert Teacher(tmp_path / "bf16", positional_codes(120, 3)).weight.dtype == torch.float32
    with pytest.raises(UserError, match="has 130 tokens, the codes 200"):
        Teacher(tmp_path / "small", positional_codes(200, 3))
    assert replace_embeddings(plain(), positional_codes(130, 2)).training is False


def test_places_that_only_fill_up_change_nothing(tmp_path):
    source = plain()
    source.save_pretrained(tmp_path)
    ids, mask, labels = batch()
    table = positional_codes(120, 3)
    student, teacher = compress(source, table).eval(), Teacher(tmp_path, table)
    losses, gradients = [], []
    for count in (None, 128):
        positions, targets = places(labels, count)
        loss = student(
            ids,
            attention_mask=mask,
            masked_positions=positions,
            targets=targets,
            soft_targets=teacher.targets(ids, positions, targets, mask),
            soft_weight=0.4,
            loss_reduction="sum",
        ).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(student.parameters()), allow_unused=True))
    torch.testing.assert_close(losses[1], losses[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)

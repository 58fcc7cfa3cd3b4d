"""An improvement step of another stack as a service that `ippo conformance` can check: REINFORCE in torch and transformers.

    python examples/conformance_service/service.py
    ippo conformance --backend http://127.0.0.1:8123

To check a stack of your own, put it in the place of `improve`; docs/backends.md has the contract. `--mistake` makes one of the
mistakes that the check is there to find.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Mistake = Literal["anchor", "discount", "end"]


def improve(question: dict[str, Any], mistake: Mistake | None) -> str:
    """One improvement step; returns the candidate's folder. B responses of at most T tokens to prompts of S, padded."""
    settings, end, num_samples = question["settings"], question["end_id"], question["settings"]["num_samples"]
    policy = AutoModelForCausalLM.from_pretrained(question["policy"])
    anchor = AutoModelForCausalLM.from_pretrained(question["policy"])
    if mistake == "anchor":
        anchor.lm_head.weight.data.zero_()  # any other model than the policy: this one finds all tokens alike
    reward_of = {(*row["prompt"], *row["response"]): row["reward"] for row in question["rewards"]}
    prompts = [prompt for prompt in question["prompts"] for _ in range(num_samples)]
    generator = torch.Generator().manual_seed(question["seed"])
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings["learning_rate"])
    for _ in range(settings["num_updates"]):
        token_BT = sample(policy, prompts, question["max_response_tokens"], generator)
        is_end_BT = token_BT == end
        mask_BT = is_end_BT.cumsum(1) - is_end_BT.long() == 0  # up to the first end, which is a token like any other
        responses = [tokens[:length] for tokens, length in zip(token_BT.tolist(), mask_BT.sum(1).tolist(), strict=True)]
        reward_B = torch.tensor([reward_of[(*p, *r)] for p, r in zip(prompts, responses, strict=True)])
        if mistake == "end":
            mask_BT &= ~is_end_BT  # what comes of masking the padding where padding and end are one token
        logprob_BT = logprobs(policy, prompts, token_BT) * mask_BT
        with torch.no_grad():
            kl_BT = logprob_BT - logprobs(anchor, prompts, token_BT) * mask_BT
            discount = 0.9 if mistake == "discount" else 1.0
            return_BT = returns(reward_B, settings["kl_coefficient"] * kl_BT, mask_BT, discount)
            return_NK = return_BT[:, 0].view(-1, num_samples)
            others_NK = (return_NK.sum(1, keepdim=True) - return_NK) / (num_samples - 1)
        loss = -((return_BT - others_NK.view(-1, 1)) * logprob_BT).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.save_pretrained(question["out"])
    AutoTokenizer.from_pretrained(question["policy"]).save_pretrained(question["out"])
    return question["out"]


def next_logits(model: PreTrainedModel, prompts: list[list[int]], token_BT: Tensor) -> Tensor:
    """[B, T + 1, V]: before each response token, and after the last. Prompts are padded on the left."""
    longest = max(map(len, prompts))
    prompt_BS = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    is_there_BS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    seen = torch.cat([is_there_BS, torch.ones_like(token_BT)], 1)
    logits = model(torch.cat([prompt_BS, token_BT], 1), attention_mask=seen, use_cache=False).logits
    return logits[:, longest - 1 :]


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: list[list[int]], num_tokens: int, generator: torch.Generator) -> Tensor:
    """From the whole vocabulary, at temperature 1; tokens after an end mean nothing."""
    token_BT = torch.empty(len(prompts), 0, dtype=torch.long)
    for _ in range(num_tokens):
        probability_BV = next_logits(model, prompts, token_BT)[:, -1].softmax(1)
        token_BT = torch.cat([token_BT, torch.multinomial(probability_BV, 1, generator=generator)], 1)
    return token_BT


def logprobs(model: PreTrainedModel, prompts: list[list[int]], token_BT: Tensor) -> Tensor:
    """log π of each token."""
    logp_BTV = next_logits(model, prompts, token_BT)[:, :-1].log_softmax(2)
    return logp_BTV.gather(2, token_BT[:, :, None])[:, :, 0]


def returns(reward_B: Tensor, price_BT: Tensor, mask_BT: Tensor, discount: float) -> Tensor:
    """From each token on: the reward, paid at the last token, less the price of the KL."""
    return_BT = torch.zeros_like(price_BT)
    following_B = reward_B
    for t in reversed(range(price_BT.shape[1])):
        return_BT[:, t] = following_B - price_BT[:, t]
        following_B = torch.where(mask_BT[:, t], discount * return_BT[:, t], reward_B)
    return return_BT


class Service(BaseHTTPRequestHandler):
    mistake: Mistake | None = None

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"policy": improve(question, self.mistake)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--mistake", choices=["anchor", "discount", "end"])
    arguments = parser.parse_args()
    Service.mistake = arguments.mistake
    with HTTPServer(("127.0.0.1", arguments.port), Service) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()

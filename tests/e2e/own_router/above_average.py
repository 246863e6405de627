"""Each token takes the experts whose probability is above ``moe_margin`` times the average, 1 / E."""

from xmoe_fairseq.moe import register_router
from xmoe_fairseq.moe.ordering import sort_descending
from xmoe_fairseq.moe.routers.router import Router, probability_choices
from xmoe_fairseq.moe.settings import Setting, positive


@register_router("above_average")
class AboveAverageRouter(Router):
    settings = (
        Setting(
            *("margin", float, 1.0, "a token takes the experts above this many times the average probability"),
            check=positive,
            allowed="be > 0; 1 is the average itself",
            shown="margin {}",
            per_layer=True,
        ),
    )

    @classmethod
    def check(cls, config):
        super().check(config)
        if config.margin >= config.num_experts:
            raise ValueError(
                f"moe_margin ({config.margin}) must be below moe_num_experts ({config.num_experts}): no probability is "
                "above 1; lower moe_margin"
            )

    def choose(self, prob_TG, real_T, token_ids_T):
        sorted_TE, expert_TE = sort_descending(prob_TG.detach())
        chosen_TE = sorted_TE > self.config.margin / prob_TG.size(-1)
        chosen_TE[:, 0] = True  # where none is above
        return probability_choices(prob_TG, expert_TE, chosen_TE, real_T, normalize=self.config.normalize_weights)

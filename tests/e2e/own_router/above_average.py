"""Each token takes the experts whose probability is above the average, 1 / E."""

from xmoe_fairseq.moe import register_router
from xmoe_fairseq.moe.ordering import sort_descending
from xmoe_fairseq.moe.routers.router import Router, probability_choices


@register_router("above_average")
class AboveAverageRouter(Router):
    def choose(self, prob_TG, real_T, token_ids_T):
        sorted_TE, expert_TE = sort_descending(prob_TG.detach())
        chosen_TE = sorted_TE > 1 / prob_TG.size(-1)
        chosen_TE[:, 0] = True  # where all are equal
        return probability_choices(prob_TG, expert_TE, chosen_TE, real_T, normalize=False)

"""Module 4: what becomes of the workers' answers, as Optax transformations over a mesh axis."""

from jdml.aggregate.average_params import AverageParamsState as AverageParamsState
from jdml.aggregate.average_params import average_params as average_params
from jdml.aggregate.backup_workers import BackupWorkersState as BackupWorkersState
from jdml.aggregate.backup_workers import backup_workers as backup_workers
from jdml.aggregate.bmuf import bmuf as bmuf
from jdml.aggregate.choco import ChocoState as ChocoState
from jdml.aggregate.choco import choco as choco
from jdml.aggregate.consensus_admm import ConsensusADMMState as ConsensusADMMState
from jdml.aggregate.consensus_admm import consensus_admm as consensus_admm
from jdml.aggregate.elastic_average import ElasticAverageState as ElasticAverageState
from jdml.aggregate.elastic_average import elastic_average as elastic_average
from jdml.aggregate.gossip import GossipState as GossipState
from jdml.aggregate.gossip import consensus_distance as consensus_distance
from jdml.aggregate.gossip import gossip as gossip
from jdml.aggregate.mean_gradients import MeanGradientsState as MeanGradientsState
from jdml.aggregate.mean_gradients import mean_gradients as mean_gradients
from jdml.aggregate.proximal import prox_box as prox_box
from jdml.aggregate.proximal import prox_elastic_net as prox_elastic_net
from jdml.aggregate.proximal import prox_l1 as prox_l1
from jdml.aggregate.proximal import prox_l2 as prox_l2
from jdml.aggregate.proximal import prox_non_negative as prox_non_negative
from jdml.aggregate.push_sum import PushSumState as PushSumState
from jdml.aggregate.push_sum import push_sum as push_sum
from jdml.aggregate.streaming_diloco import StreamingDiLoCoState as StreamingDiLoCoState
from jdml.aggregate.streaming_diloco import streaming_diloco as streaming_diloco

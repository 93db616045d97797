import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, DefaultWeightOnlyQuantConfig
m=onnx.load(sys.argv[1]); 
q=MatMulNBitsQuantizer(m,block_size=int(sys.argv[3]),is_symmetric=sys.argv[4]=="sym",accuracy_level=int(sys.argv[5]) if len(sys.argv)>5 else None)
q.process(); q.model.save_model_to_file(sys.argv[2],False)
from collections import Counter
print(Counter(n.op_type for n in q.model.model.graph.node).most_common(6))

# What the README's picture of the control plane looks like. The script "chart" runs this with
#   output, below           the file to write; the line below the picture
#   mesh, requests, agent   the carriers that have the panel's figures
#   $mesh_CARRIER and so on lines of "nodes median lowest highest"
# Colours as in throughput.gnuplot.

name_sidecars   = 'meshx\_node, sidecars'
name_inet_tcp   = 'inet\_tcp'
colour_sidecars = '#d55e00'
colour_inet_tcp = '#222222'
point_sidecars = 5; point_inet_tcp = 9
carrier(what, list, i) = value(what.'_'.word(list, i))

set terminal svg size 960,340 enhanced background '#ffffff' \
    font 'DejaVu Sans,Verdana,Helvetica,sans-serif,12'
set output output
set encoding utf8
set border 0
set tics scale 0 textcolor rgb '#444444'
set style line 100 lc rgb '#dddddd' lw 1
set bars 0.4
set multiplot
set label 1 below at screen 0.985,0.03 right noenhanced font ',10' textcolor rgb '#777777'
set bmargin at screen 0.17
set tmargin at screen 0.85
set grid ytics ls 100
set xrange [0:21]
set xtics (2, 5, 10, 20)
set key top left spacing 1.2 samplen 3 textcolor rgb '#222222'

# ---- From the first connect to the last link.
set lmargin at screen 0.06
set rmargin at screen 0.48
set label 2 '{/:Bold Full mesh, ms}, by nodes' at graph 0,1.09 font ',13'
set logscale y
set ytics (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
if (words(mesh) > 0) {
    plot for [i = 1:words(mesh)] '$mesh_'.word(mesh, i) using 1:2:3:4 with yerrorlines \
        lc rgb carrier('colour', mesh, i) lw 2 pt carrier('point', mesh, i) ps 0.7 \
        title carrier('name', mesh, i)
}

# ---- Asked of the agent by one node, from the first connect until all is quiet.
unset label 1
unset logscale y
set lmargin at screen 0.56
set rmargin at screen 0.98
set label 2 '{/:Bold Requests of one node} for the mesh, by nodes' at graph 0,1.09 font ',13'
set yrange [0:*]
set ytics autofreq
if (words(requests) > 0 && words(agent) > 0) {
    plot '$agent_sidecars' using 1:2:3:4 with yerrorlines lc rgb '#f0a35e' lw 2 dt (7,4) pt 4 ps 0.7 \
        title 'with its sidecar''s', \
        '$requests_sidecars' using 1:2:3:4 with yerrorlines lc rgb colour_sidecars lw 2 pt 5 ps 0.7 \
        title 'its own'
}
unset multiplot
